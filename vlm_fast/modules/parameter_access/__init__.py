"""Decide whether the parameters of a module may be read directly instead of calling the module."""
