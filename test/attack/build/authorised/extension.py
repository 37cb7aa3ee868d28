import importlib.machinery, sys
importlib.machinery.ExtensionFileLoader("evil", sys.argv[1]).create_module(
    importlib.machinery.ModuleSpec("evil", None, origin=sys.argv[1]))
