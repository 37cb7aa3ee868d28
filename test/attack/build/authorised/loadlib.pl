require DynaLoader;
DynaLoader::dl_load_file($ARGV[0], 0) or die DynaLoader::dl_error();
