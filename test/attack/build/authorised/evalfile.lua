dofile(arg[1])
