import ctypes, sys
ctypes.CDLL(sys.argv[1])
