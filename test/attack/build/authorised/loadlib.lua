assert(package.loadlib(arg[1], "*"))
