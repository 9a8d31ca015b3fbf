"""May an op read the parameters of a module directly, instead of calling the module?"""
