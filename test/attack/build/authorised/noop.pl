use constant X => 1;
1;
