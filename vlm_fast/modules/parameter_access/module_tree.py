"""May an op read the parameters of all submodules of a module directly, instead of calling them?

`linear.why_not_direct` answers this for one linear in a few microseconds. A Q-Former reads a
hundred linears in every forward. So the answer for a tree is stored on its root, together with the
facts that it depends on. Each call then only compares: the same children, classes, code and
parameters, and no hooks or wrappers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _nn_module

from vlm_fast.modules.parameter_access.activation import activation_name, why_not_activation
from vlm_fast.modules.parameter_access.attention_settings import (
    attention_function,
    chosen_attention,
    has_attention_choice,
    why_unknown_attention,
)
from vlm_fast.modules.parameter_access.linear import why_not_direct
from vlm_fast.modules.parameter_access.module_calls import (
    GLOBAL_HOOKS,
    HOOKS,
    has_replaced_forward,
    only_output_hooks,
    why_call_does_more,
)
from vlm_fast.modules.parameter_access.original_code import (
    class_before_patch,
    defining_package,
    own_methods,
    why_not_original_class,
)
from vlm_fast.modules.parameter_access.sharded_parameters import is_zero3_partitioned

_ALL_GLOBAL_HOOKS = [
    getattr(_nn_module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward")
] + [_nn_module._global_backward_pre_hooks]  # fmt: skip
# Classes of torch whose forward the ops of this package replace.
_KNOWN_TORCH_CLASSES = {
    nn.LayerNorm, nn.Dropout, nn.ModuleList, nn.Sequential, nn.Identity, nn.Tanh,
    nn.MultiheadAttention,
}  # fmt: skip


class TreeSnapshot:
    """The submodules of a root and, after `record`, all facts that the answer depends on."""

    def __init__(self, root: nn.Module) -> None:
        self.package = defining_package(class_before_patch(root))
        found = {name: m for name, m in root.named_modules() if m is not root}
        self.names, self.modules = list(found), list(found.values())
        self.owns = [m.__dict__ for m in self.modules]
        self.types = list(map(type, self.modules))
        self.root_class = class_before_patch(root)
        choosing: list[Any] = [m for m in (root, *self.modules) if has_attention_choice(m)]
        self.attentions = list({id(m.config): m for m in choosing}.values())

    def record(self, root: nn.Module) -> None:
        """Store what `unchanged` compares at later calls."""
        kinds = {self.root_class, *(class_before_patch(m) for m in self.modules)}
        self.code = [
            (kind, name, function)
            for kind in kinds
            for name, function in (
                *own_methods(kind),
                ("forward", kind.forward),
                ("__call__", kind.__call__),
            )
        ]
        self.implementations = [
            (module.config, *chosen, attention_function(*chosen))
            for module in self.attentions
            for chosen in [chosen_attention(module)]
        ]
        self.hooks = [own[kind] for own in self.owns for kind in HOOKS] + _ALL_GLOBAL_HOOKS
        parents = [root.__dict__, *self.owns]
        self.slots = [(own["_modules"], name) for own in parents for name in own["_modules"]]
        self.children = [children[name] for children, name in self.slots]
        self.parameter_slots = [
            (own, own["_parameters"], name) for own in self.owns for name in own["_parameters"]
        ]
        self.parameters = [parameters[name] for _, parameters, name in self.parameter_slots]

    def unchanged(self) -> bool:
        """Whether all recorded facts still hold."""
        for kind, method, function in self.code:
            if getattr(kind, method) is not function:
                return False
        for config, name, eager_module, function in self.implementations:
            if config._attn_implementation != name:
                return False
            if attention_function(name, eager_module) is not function:
                return False
        if any(self.hooks) and not all(map(only_output_hooks, filter(None, self.hooks))):
            return False
        if list(map(type, self.modules)) != self.types:
            return False
        for children, (slots, name) in zip(self.children, self.slots, strict=True):
            if slots.get(name) is not children:
                return False
        for parameter, (own, slots, name) in zip(
            self.parameters, self.parameter_slots, strict=True
        ):
            if slots.get(name) is not parameter or name in own:  # an attribute hides it
                return False
        for own, module in zip(self.owns, self.modules, strict=True):
            if "forward" in own and has_replaced_forward(module):
                return False
            if own.get("_compiled_call_impl") is not None:
                return False
        return not any(map(_is_absent, self.parameters))

    def why_not(self, biases: bool = True, unread: str | None = None) -> str | None:
        """See `why_not_direct_tree`; computed anew."""
        reason = why_not_original_class(self.root_class)
        if reason is not None:
            return reason
        for module in self.attentions:
            reason = why_unknown_attention(*chosen_attention(module))
            if reason is not None:
                return reason
        for name, module in zip(self.names, self.modules, strict=True):
            if name.rpartition(".")[2] == unread:
                continue
            if isinstance(module, nn.Linear):
                reason = why_not_direct(module)
                if reason is None and biases and module._parameters["bias"] is None:
                    reason = "it has no bias"
            elif activation_name(module) is not None:
                reason = why_not_activation(module)
            else:
                reason = self._why_not_known(module)
            if reason is not None:
                return f"{name}: {reason}"
        return None

    def why_not_containers(self, called: set[str]) -> str | None:
        """Why the modules around the children named ``called`` do more than is known, or None.

        The children themselves are called, so they may be anything. Global hooks are ignored.
        """
        for name, module in zip(self.names, self.modules, strict=True):
            if called.isdisjoint(name.split(".")):
                reason = self._why_not_known(module)
                if reason is not None and reason != GLOBAL_HOOKS:
                    return f"{name}: {reason}"
        return None

    def _why_not_known(self, module: nn.Module) -> str | None:
        """Why a norm, dropout or container does more than its known code says, or None."""
        kind = class_before_patch(module)
        if hasattr(module, "in_features"):  # an adapter or a quantized linear
            return why_not_direct(module)
        known = kind in _KNOWN_TORCH_CLASSES or kind.__module__.startswith("vlm_fast.")
        if not known and defining_package(kind) != self.package:
            return f"{kind.__module__}.{kind.__qualname__} is not a class whose code was read"
        reason = why_not_original_class(kind)
        if reason is not None:
            return reason
        if not only_output_hooks(module._forward_hooks):
            return "it has hooks"
        parameters = module._parameters
        if kind is nn.LayerNorm and (parameters["weight"] is None or parameters["bias"] is None):
            return "it has no weight or no bias"
        return why_call_does_more(module, ignore_forward_hooks=True)

    def __reduce__(self) -> Any:
        # A copy of the root must look at its own children: a copied snapshot becomes None.
        return type(None), ()


def why_not_direct_tree(
    root: nn.Module, *, biases: bool = True, unread: str | None = None
) -> str | None:
    """Why a submodule of ``root`` must be called, with its name; None if all can be read directly.

    Args:
        root: only the code of its class is checked, not its hooks: it is being called already.
        biases: whether each linear must have a bias.
        unread: name of a child that the forward of its parent never calls.
    """
    snapshot = root.__dict__.get("_tree_snapshot")
    if torch.compiler.is_compiling():
        return TreeSnapshot(root).why_not(biases, unread)
    if snapshot is not None and snapshot.unchanged():
        return None
    tree = TreeSnapshot(root)
    reason = tree.why_not(biases, unread)
    if reason is None:
        tree.record(root)
        # A plain attribute of the root: both are garbage-collected together.
        object.__setattr__(root, "_tree_snapshot", tree)
    return reason


def forget_snapshot(root: nn.Module) -> None:
    """Remove what `why_not_direct_tree` has stored on ``root``."""
    root.__dict__.pop("_tree_snapshot", None)


def tree_parameters(root: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of ``root`` and its submodules, from the stored snapshot if there is one."""
    snapshot = root.__dict__.get("_tree_snapshot")
    if snapshot is None or torch.compiler.is_compiling():
        return root.parameters()
    return (p for p in (*root._parameters.values(), *snapshot.parameters) if p is not None)


def why_tree_dtypes_differ(root: nn.Module, *inputs: Tensor | None) -> str | None:
    """Why the inputs and the parameters of a tree do not share one dtype to compute in, or None.

    Under autocast linears compute in its dtype; norms and gates may then have the dtype of the
    first input, or float32.
    """
    dtype = next(x.dtype for x in inputs if x is not None)
    device = next(x.device.type for x in inputs if x is not None)
    autocasts = torch.is_autocast_enabled(device)
    for x in inputs:
        if x is not None and x.dtype is not dtype and not autocasts:
            return f"its inputs are {dtype} and {x.dtype}"
    for parameter in tree_parameters(root):
        found = parameter.dtype
        if found is dtype:
            continue
        if not autocasts or (parameter.ndim == 1 and found is not torch.float32):
            return f"it has parameters in {found}, its input is {dtype}"
    return None


def _is_absent(parameter: Tensor | None) -> bool:
    return parameter is not None and (parameter.is_meta or is_zero3_partitioned(parameter))
