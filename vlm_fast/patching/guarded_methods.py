"""Methods of patched classes: a mixin's, unless the method of the base class has been replaced."""

from __future__ import annotations

import functools
from typing import Any

from torch.fx import Proxy

from vlm_fast.fallback import record_fallback
from vlm_fast.patching.argument_names import ArgumentNames


def remembered_forward_of(mixin: type) -> Any:
    """``remembered_forward`` of the class that defines the forward of a mixin, or None."""
    kind = next((kind for kind in mixin.__mro__ if "forward" in vars(kind)), mixin)
    return getattr(kind, "remembered_forward", None) if "remembered_forward" in vars(kind) else None


def guarded_method(
    base: Any, mixin: Any, name: str, original: Any, names: ArgumentNames | None, remembered: Any
) -> Any:
    """The mixin's method, guarded: calls the base's instead if that is no longer ``original``.

    ``remembered``: the mixin's ``remembered_forward``, or None.
    """

    own = getattr(mixin, name)

    @functools.wraps(original)  # transformers inspects its signature
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if remembered is not None and len(args) == 1 and not kwargs and mixin.forward is own:
            found = remembered(self, args[0])
            if found is not NotImplemented:
                return found
        current = getattr(base, name)
        if current is not original:
            record_fallback(base.__name__, _replaced(base, name))
            return current(self, *args, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Proxy):  # torch.fx.symbolic_trace
                return current(self, *args, **kwargs)
        if names is None or (not kwargs and names.by_position(len(args))):
            return getattr(mixin, name)(self, *args, **kwargs)
        arguments = names.to_override(args, kwargs)
        if arguments is None:  # wrong arguments: the base raises the error
            return current(self, *args, **kwargs)
        return getattr(mixin, name)(self, **arguments)

    return method


def make_why_base_replaced(base: Any, originals: dict[str, Any]) -> Any:
    def why_base_replaced(self: Any) -> str | None:
        for name, original in originals.items():
            if getattr(base, name) is not original:
                return _replaced(base, name)
        return None

    return why_base_replaced


def guarded_why_not(mixin: Any) -> Any:
    @functools.wraps(mixin.why_not)
    def why_not(self: Any) -> str | None:
        return self.why_base_replaced() or mixin.why_not(self)

    return why_not


def _replaced(base: type, name: str) -> str:
    return f"{base.__name__}.{name} has been replaced since it was patched"
