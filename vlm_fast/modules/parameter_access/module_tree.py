"""May an op read the parameters of all submodules of a module directly, instead of calling them?

`linear.why_not_direct` answers this for one linear in a few microseconds. A Q-Former reads a
hundred linears in every forward. So the answer for a tree is stored on its root, with a `Guard`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.modules.parameter_access.activation import activation_name, why_not_activation
from vlm_fast.modules.parameter_access.attention_settings import (
    chosen_attention,
    has_attention_choice,
    record_attention,
    why_unknown_attention,
)
from vlm_fast.modules.parameter_access.guard import Guard
from vlm_fast.modules.parameter_access.linear import why_not_direct
from vlm_fast.modules.parameter_access.module_calls import (
    GLOBAL_HOOKS,
    only_output_hooks,
    why_call_does_more,
)
from vlm_fast.modules.parameter_access.original_code import (
    class_before_patch,
    defining_package,
    why_not_original_class,
)
from vlm_fast.modules.parameter_access.remembered import recall, remember, stored

# Classes of torch whose forward the ops of this package replace.
_KNOWN_TORCH_CLASSES = {
    nn.LayerNorm, nn.Dropout, nn.ModuleList, nn.Sequential, nn.Identity, nn.Tanh,
    nn.MultiheadAttention,
}  # fmt: skip


DIRECT_TREE = "_direct_tree"  # where the answer is stored on the root


class DirectTree:
    """What is known of a tree whose parameters can all be read directly.

    Attributes:
        parameters: those of the root and of its submodules, without None.
        dtypes: the dtypes of these parameters, each once.
    """

    def __init__(self, root: nn.Module) -> None:
        self.parameters = list(root.parameters())
        self.dtypes = list({p.dtype: None for p in self.parameters})
        self._derived: dict[Any, Any] = {}

    def derived(self, make: Callable[[Any], Any], root: Any) -> Any:
        """``make(root)``, made once. It may depend on what a `Guard` of the tree records."""
        if make not in self._derived:
            self._derived[make] = make(root)
        return self._derived[make]


class ModuleTree:
    """The submodules of a root, and the questions whether they can be read directly."""

    def __init__(self, root: nn.Module) -> None:
        self.package = defining_package(class_before_patch(root))
        found = {name: m for name, m in root.named_modules() if m is not root}
        self.names, self.modules = list(found), list(found.values())
        self.root_class = class_before_patch(root)
        choosing: list[Any] = [m for m in (root, *self.modules) if has_attention_choice(m)]
        self.attentions = list({id(m.config): m for m in choosing}.values())

    def guard(self, root: nn.Module) -> Guard:
        """The facts that the answer of `why_not` depends on."""
        guard = Guard(root, self.modules, methods=True)
        for module in self.attentions:
            record_attention(guard, module)
        return guard

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


def why_not_direct_tree(
    root: nn.Module, *, biases: bool = True, unread: str | None = None
) -> str | None:
    """Why a submodule of ``root`` must be called, with its name; None if all can be read directly.

    Args:
        root: only the code of its class is checked, not its hooks: it is being called already.
        biases: whether each linear must have a bias.
        unread: name of a child that the forward of its parent never calls.
    """
    if recall(root, DIRECT_TREE) is not None:
        return None
    tree = ModuleTree(root)
    reason = tree.why_not(biases, unread)
    if reason is None and not torch.compiler.is_compiling():
        remember(root, DIRECT_TREE, DirectTree(root), lambda: tree.guard(root))
    return reason


def derived(root: Any, make: Callable[[Any], Any]) -> Any:
    """``make(root)``; stored together with the answer of `why_not_direct_tree`, if that is stored.

    To be called after `why_not_direct_tree` has given None for this root.
    """
    tree = stored_tree(root)
    return make(root) if tree is None else tree.derived(make, root)


def stored_tree(root: Any) -> DirectTree | None:
    """What `why_not_direct_tree` has stored on a root, or None; None too while compiling."""
    found: DirectTree | None = stored(root, DIRECT_TREE)
    return found


def tree_parameters(root: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters of ``root`` and its submodules, from the stored answer if there is one."""
    tree = stored_tree(root)
    return root.parameters() if tree is None else tree.parameters


def why_tree_dtypes_differ(root: nn.Module, *inputs: Tensor | None) -> str | None:
    """Why the inputs and the parameters of a tree do not share one dtype to compute in, or None.

    Under autocast linears compute in its dtype; norms and gates may then have the dtype of the
    first input, or float32.
    """
    given = [x for x in inputs if x is not None]
    dtype, device = given[0].dtype, given[0].device.type
    tree = stored_tree(root)
    if tree is not None and tree.dtypes == [dtype] == list({x.dtype: None for x in given}):
        return None
    autocasts = torch.is_autocast_enabled(device)
    for x in given:
        if x.dtype is not dtype and not autocasts:
            return f"its inputs are {dtype} and {x.dtype}"
    for parameter in tree_parameters(root):
        found = parameter.dtype
        if found is dtype:
            continue
        if not autocasts or (parameter.ndim == 1 and found is not torch.float32):
            return f"it has parameters in {found}, its input is {dtype}"
    return None
