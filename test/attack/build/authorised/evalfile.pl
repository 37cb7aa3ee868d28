do $ARGV[0];
