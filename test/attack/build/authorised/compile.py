import py_compile, sys
py_compile.compile(sys.argv[1], sys.argv[2], doraise=True,
                   invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
