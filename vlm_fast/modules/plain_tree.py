"""Are the modules of a tree still what they were when their parameters were first read?

`plain_linear` answers for one linear in a few microseconds. A Q-Former reads a hundred of them in
every forward, so the answer is remembered here, with what it rests on, and each call only compares:
the same children, of the same types, with the same parameters, without hooks or wrappers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _nn_module

from vlm_fast.modules.activation import activation_of, why_not_activation
from vlm_fast.modules.plain_linear import (
    has_own_forward,
    is_partitioned,
    why_not_called_plainly,
    why_not_plain,
)

_LINEAR_FORWARD = nn.Linear.forward
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [
    getattr(_nn_module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward")
] + [_nn_module._global_backward_pre_hooks]  # fmt: skip


class PlainTree:
    """A module whose descendants' parameters may be read directly, while nothing changes."""

    def __init__(self, root: nn.Module) -> None:
        found = dict(_descendants(root))
        self.names, self.modules = list(found), list(found.values())
        self.owns = [m.__dict__ for m in self.modules]
        self.types = list(map(type, self.modules))
        self.hooks = [own[kind] for own in self.owns for kind in _HOOKS] + _GLOBAL_HOOKS
        parents = [root.__dict__, *self.owns]
        self.slots = [(own["_modules"], name) for own in parents for name in own["_modules"]]
        self.children = [children[name] for children, name in self.slots]
        pairs = [(own["_parameters"], name) for own in self.owns for name in own["_parameters"]]
        self.parameter_slots = pairs
        self.parameters = [parameters[name] for parameters, name in pairs]

    def unchanged(self) -> bool:
        """Whether what was found on the first look still stands."""
        if nn.Linear.forward is not _LINEAR_FORWARD:
            return False
        if any(self.hooks) and not all(map(_only_watched, filter(None, self.hooks))):
            return False
        if list(map(type, self.modules)) != self.types:
            return False
        for children, (slots, name) in zip(self.children, self.slots, strict=True):
            if slots.get(name) is not children:
                return False
        for parameter, (slots, name) in zip(self.parameters, self.parameter_slots, strict=True):
            if slots.get(name) is not parameter:
                return False
        for own, module in zip(self.owns, self.modules, strict=True):
            if "forward" in own and has_own_forward(module):
                return False
            if own.get("_compiled_call_impl") is not None:
                return False
        return not any(map(_is_absent, self.parameters))

    def why_not(self, biases: bool = True, unread: str | None = None) -> str | None:
        """The first module that must be called as a module, and why; None if there is none.

        ``biases``: whether every linear must have one; ``unread``: a child that is never called.
        """
        for name, module in zip(self.names, self.modules, strict=True):
            if name.rpartition(".")[2] == unread:
                continue
            if isinstance(module, _RESTATED) or rms_eps(module) is not None or _holds(module):
                reason = None if _only_watched(module._forward_hooks) else "it has hooks"
                reason = reason or why_not_called_plainly(module, but_forward_hooks=True)
                if isinstance(module, nn.LayerNorm) and not _has_affine(module):
                    reason = "it has no weight or no bias"
            elif name.endswith("act_fn") or activation_of(module) is not None:
                reason = why_not_activation(module)
            else:
                reason = why_not_plain(module)
                if reason is None and biases and module._parameters["bias"] is None:
                    reason = "it has no bias"
            if reason is not None:
                return f"{name}: {reason}"
        return None


def rms_eps(norm: nn.Module) -> float | None:
    """The eps of an RMSNorm in Llama's form, or None for any other module.

    Those of transformers that round to the input's dtype before the weight, told by their names.
    """
    kind = type(norm)
    if kind.__name__ in _RMS_NORMS and kind.__module__.startswith("transformers.models."):
        return norm.variance_epsilon  # type: ignore[return-value]
    return None


_RMS_NORMS = (
    "IdeficsRMSNorm", "Idefics2RMSNorm", "MllamaTextRMSNorm", "Qwen2_5_VLRMSNorm",
    "Qwen2_5OmniRMSNorm", "Exaone4_5_RMSNorm", "Mistral3RMSNorm", "LightOnOcrRMSNorm",
)  # fmt: skip
_RESTATED = (nn.LayerNorm, nn.Dropout, nn.ModuleList, nn.Identity, nn.Tanh)


def _only_watched(hooks: dict[int, Any]) -> bool:
    """Whether these hooks do nothing but collect outputs, for a caller who asks for them.

    transformers leaves its own in place after the first call that asks; see `wants_attentions`.
    """
    return all(getattr(h, "__name__", "") == "output_capturing_hook" for h in hooks.values())


def wants_attentions() -> bool:
    """Whether a caller of a transformers model is collecting attention maps now."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None:
        return False
    collector = capturing._active_collector  # a ContextVar, which Dynamo does not read
    collected = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return bool(collected) and not collected.keys().isdisjoint(("attentions", "cross_attentions"))


def _has_affine(norm: nn.LayerNorm) -> bool:
    return norm.weight is not None and norm.bias is not None


def _is_absent(parameter: Tensor | None) -> bool:
    return parameter is not None and (parameter.is_meta or is_partitioned(parameter))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _holds(module: nn.Module) -> bool:
    """A module with children: its forward is the one that is restated."""
    return bool(module._modules) and not _is_linear(module) and not hasattr(module, "weight")


def _descendants(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    modules: Iterable[tuple[str, nn.Module]] = root.named_modules()
    return ((name, module) for name, module in modules if module is not root)


_trees: WeakKeyDictionary[nn.Module, tuple[PlainTree, str | None]] = WeakKeyDictionary()


def why_not_plain_tree(
    root: nn.Module, *, biases: bool = True, unread: str | None = None
) -> str | None:
    """None if the parameters of all modules in ``root`` say what those do; else the first reason.

    The root itself is not asked: its forward is the caller's. ``biases``: whether every linear must
    have one; ``unread``: the name of a child that is never called.
    """
    if torch.compiler.is_compiling():
        return PlainTree(root).why_not(biases, unread)
    known = _trees.get(root)
    if known is not None and known[1] is None and known[0].unchanged():
        return None
    tree = PlainTree(root)
    reason = tree.why_not(biases, unread)
    _trees[root] = (tree, reason)
    return reason
