"""`Report`: which modules `vlm_fast.patch` patched, which it skipped and why, and how to revert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import nn

from vlm_fast.patching.class_swap import swap_back, why_not_swapped_back
from vlm_fast.patching.patched_module import PatchedModule


@dataclass
class Report:
    """The result of `vlm_fast.patch`. As a context manager it reverts the patch at the end.

    Attributes:
        patched: for each patched module, by name, its class and the mixin that serves it.
        skipped: for each candidate that was not patched, by name, the reason. A model that is
            patched except for its merge of image tokens is listed here too.
        modules: the patched modules.
    """

    patched: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    modules: list[nn.Module] = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Give each module in this report its original class back.

        Raises:
            ValueError: a module has been sharded or parametrized since; nothing is changed then.
        """
        swap_back_all([module for module in self.modules if isinstance(module, PatchedModule)])
        self.modules.clear()

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.revert()

    def __str__(self) -> str:
        lines = [f"patched {name or '(the model)'}: {what}" for name, what in self.patched.items()]
        lines += [f"skipped {name or '(the model)'}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines) or "nothing to patch"


def patched_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and the module of each patched module in ``model``, itself included."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, PatchedModule))


def swap_back_all(modules: list[Any]) -> None:
    """Give all of these patched modules their original class back, or none of them.

    Raises:
        ValueError: a module has been sharded or parametrized since it was patched.
    """
    for module in modules:
        reason = why_not_swapped_back(module)
        if reason is not None:
            name = type(module).patch_spec.base.__name__
            raise ValueError(f"vlm_fast.unpatch: {name} stays patched: {reason}")
    for module in modules:
        swap_back(module)
