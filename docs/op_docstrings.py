"""An extension of griffe: an op gets the docstring that it has at run time.

The declaration of an op adds the shapes and dtypes of its arguments to its docstring. The source
has only what the author wrote.
"""

import importlib
from typing import Any

import griffe


class OpDocstrings(griffe.Extension):
    """Replaces the docstrings of functions that are ops."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """What griffe calls for each function that it finds in the source."""
        if not func.path.startswith("vlm_fast.ops.") or func.docstring is None:
            return
        module, _, name = func.path.rpartition(".")
        ops = importlib.import_module("vlm_fast.ops.declaration").OPS
        op = ops.get(name)
        if op is not None and op.__module__ == module:
            func.docstring.value = op.__doc__.strip()
