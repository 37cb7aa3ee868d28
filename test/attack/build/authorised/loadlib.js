process.dlopen({ exports: {} }, process.argv[2]);
