"""Are the modules of a tree what their parameters say, and nothing more?

`plain_linear` answers for one linear in a few microseconds. A Q-Former reads a hundred of them in
every forward. So the answer is kept on the root of the tree, with what it rests on, and each call
only compares: the same children, of the same types, with the same code and the same parameters,
without hooks or wrappers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _nn_module

from vlm_fast.modules.parameter_access.activation import activation_name, why_not_activation
from vlm_fast.modules.parameter_access.linear import (
    GLOBAL_HOOKS,
    has_replaced_forward,
    is_zero3_partitioned,
    why_call_does_more,
    why_not_direct,
)
from vlm_fast.modules.parameter_access.original_code import (
    class_before_patch,
    defining_package,
    own_methods,
    why_not_original_class,
)
from vlm_fast.ops.registration import constant_while_compiling

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [
    getattr(_nn_module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward")
] + [_nn_module._global_backward_pre_hooks]  # fmt: skip
# Modules of torch whose forward is restated.
_RESTATED = {
    nn.LayerNorm, nn.Dropout, nn.ModuleList, nn.Sequential, nn.Identity, nn.Tanh,
    nn.MultiheadAttention,
}  # fmt: skip
_ATTENTIONS = {
    None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4",
    "flex_attention", "vlm_fast",
}  # fmt: skip


class TreeSnapshot:
    """What was found on the first look at a tree: as long as it stands, the answer stands."""

    def __init__(self, root: nn.Module) -> None:
        self.home = defining_package(class_before_patch(root))
        found = dict(_descendants(root))
        self.names, self.modules = list(found), list(found.values())
        self.owns = [m.__dict__ for m in self.modules]
        self.types = list(map(type, self.modules))
        self.root_class = class_before_patch(root)
        choosing: list[Any] = [m for m in (root, *self.modules) if _chooses(m)]
        self.attentions = list({id(m.config): m for m in choosing}.values())

    def remember(self, root: nn.Module) -> None:
        """Take down what a later call compares."""
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
            (module.config, *chosen, _attention(*chosen))
            for module in self.attentions
            for chosen in [_chosen_attention(module)]
        ]
        self.hooks = [own[kind] for own in self.owns for kind in _HOOKS] + _GLOBAL_HOOKS
        parents = [root.__dict__, *self.owns]
        self.slots = [(own["_modules"], name) for own in parents for name in own["_modules"]]
        self.children = [children[name] for children, name in self.slots]
        self.parameter_slots = [
            (own, own["_parameters"], name) for own in self.owns for name in own["_parameters"]
        ]
        self.parameters = [parameters[name] for _, parameters, name in self.parameter_slots]

    def unchanged(self) -> bool:
        """Whether what was found on the first look still stands."""
        for kind, method, function in self.code:
            if getattr(kind, method) is not function:
                return False
        for config, name, home_of_eager, function in self.implementations:
            if config._attn_implementation != name:
                return False
            if _attention(name, home_of_eager) is not function:
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
            if slots.get(name) is not parameter or name in own:  # which hides it
                return False
        for own, module in zip(self.owns, self.modules, strict=True):
            if "forward" in own and has_replaced_forward(module):
                return False
            if own.get("_compiled_call_impl") is not None:
                return False
        return not any(map(_is_absent, self.parameters))

    def why_not(self, biases: bool = True, unread: str | None = None) -> str | None:
        """The first module that must be called as a module, and why; None if there is none.

        ``biases``: whether every linear must have one; ``unread``: a child that is never called.
        """
        reason = why_not_original_class(self.root_class)
        if reason is not None:
            return reason
        for choosing in self.attentions:
            reason = _why_not_attention(*_chosen_attention(choosing))
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
                reason = self._why_not_restated(module)
            if reason is not None:
                return f"{name}: {reason}"
        return None

    def why_not_containers(self, called: set[str]) -> str | None:
        """Why what lies around the children of these names is more than what is restated.

        Those children are called, and may be anything. Hooks of every module count as nothing.
        """
        for name, module in zip(self.names, self.modules, strict=True):
            if called.isdisjoint(name.split(".")):
                reason = self._why_not_restated(module)
                if reason is not None and reason != GLOBAL_HOOKS:
                    return f"{name}: {reason}"
        return None

    def _why_not_restated(self, module: nn.Module) -> str | None:
        """Why a norm, a dropout or a container is more than what is restated of it."""
        kind = class_before_patch(module)
        if hasattr(module, "in_features"):  # an adapter or a quantised linear
            return why_not_direct(module)
        if kind not in _RESTATED and defining_package(kind) not in (
            self.home,
            *_homes_of_own(kind),
        ):
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
        # A copy of the root looks through its own children.
        return type(None), ()


def unwrap_checkpoint(layer: Any) -> Any:
    """A layer without torch's wrapper for activation checkpointing."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)


def rms_eps(norm: nn.Module) -> float | None:
    """The eps of an RMSNorm in Llama's form, or None for any other module.

    Those of transformers that round to the input's dtype before the weight, told by their names.
    """
    kind = type(norm)
    if kind.__name__ in _RMS_NORMS and kind.__module__.startswith("transformers.models."):
        return norm.variance_epsilon  # type: ignore[return-value]
    return None


_RMS_NORMS = (
    "IdeficsRMSNorm", "Idefics2RMSNorm", "MllamaTextRMSNorm", "Qwen2RMSNorm", "Qwen2_5_VLRMSNorm",
    "Qwen2_5OmniRMSNorm", "Exaone4_5_RMSNorm", "Mistral3RMSNorm", "LightOnOcrRMSNorm",
)  # fmt: skip


def _homes_of_own(kind: type) -> tuple[str, ...]:
    """This package's modules may stand in any tree."""
    return (defining_package(kind),) if kind.__module__.startswith("vlm_fast.") else ()


def _chooses(module: nn.Module) -> bool:
    """Whether a module chooses its attention by its config."""
    return hasattr(module.__dict__.get("config"), "_attn_implementation")


def _chosen_attention(module: Any) -> tuple[str | None, str]:
    """The name of the attention that a module chooses, and where its eager one is defined."""
    return module.config._attn_implementation, class_before_patch(module).__module__


def _attention(name: str | None, home_of_eager: str) -> Any:
    """The function that transformers calls for an attention of this name."""
    if name in (None, "eager"):
        return getattr(sys.modules.get(home_of_eager), "eager_attention_forward", None)
    modeling = sys.modules.get("transformers.modeling_utils")
    functions = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", None)
    return None if functions is None else functions.get(name)


@constant_while_compiling
def _why_not_attention(name: str | None, home_of_eager: str) -> str | None:
    """Why an attention of transformers is not the formula that is restated, or None."""
    if name not in _ATTENTIONS:
        return f"its attention is {name!r}, which was not read"
    origin = getattr(_attention(name, home_of_eager), "__module__", "transformers.")
    if not origin.startswith(("transformers.", "vlm_fast.")):
        return f"the attention {name or 'eager'!r} has been replaced by one of {origin}"
    return None


def only_output_hooks(hooks: dict[int, Any]) -> bool:
    """Whether these hooks do nothing but collect outputs, for a caller who asks for them.

    transformers leaves its own in place after the first call that asks; see `collects_attentions`.
    """
    return all(getattr(h, "__name__", "") == "output_capturing_hook" for h in hooks.values())


def why_no_extra_arguments(module: nn.Module) -> str | None:
    """Why a module must be called with the arguments that its class has, or None.

    Whoever hooks a layer, or replaced its forward, expects those. Hooks of this package, of
    torch.distributed and of DeepSpeed look at no argument by name.
    """
    own = module.__dict__
    for kind in _HOOKS[:2]:
        for hook in own[kind].values():
            origin = getattr(getattr(hook, "func", hook), "__module__", "") or ""
            known = origin.startswith(("vlm_fast.", "torch.distributed.", "deepspeed."))
            if not known and getattr(hook, "__name__", "") != "output_capturing_hook":
                return "it has hooks"
    if has_replaced_forward(module):
        return "its forward has been replaced (accelerate or another wrapper)"
    return None


def collects_attentions() -> bool:
    """Whether a caller of a transformers model is collecting attention maps now."""
    return _is_collecting("attentions", "cross_attentions")


def collects_hidden_states() -> bool:
    """Whether a caller of a transformers model is collecting hidden states now."""
    return _is_collecting("hidden_states")


def _is_collecting(*keys: str) -> bool:
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None:
        return False
    collector = capturing._active_collector  # a ContextVar, which Dynamo does not read
    collected = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return bool(collected) and not collected.keys().isdisjoint(keys)


def why_tree_dtypes_differ(root: nn.Module, *inputs: Tensor | None) -> str | None:
    """Why a tree that computes in one dtype cannot take these inputs, or None.

    Autocast gives linears its dtype; norms and gates are then read in that of the first input, or
    in float32.
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


def tree_parameters(root: nn.Module) -> Iterator[nn.Parameter]:
    """Those of the root and of all modules in it, as `why_not_direct_tree` last found them."""
    known = root.__dict__.get("_tree_snapshot")
    if known is None or torch.compiler.is_compiling():
        return root.parameters()
    return (p for p in (*root._parameters.values(), *known.parameters) if p is not None)


def _is_absent(parameter: Tensor | None) -> bool:
    return parameter is not None and (parameter.is_meta or is_zero3_partitioned(parameter))


def _descendants(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    modules: Iterator[tuple[str, nn.Module]] = root.named_modules()
    return ((name, module) for name, module in modules if module is not root)


def why_not_direct_tree(
    root: nn.Module, *, biases: bool = True, unread: str | None = None
) -> str | None:
    """None if the parameters of all modules in ``root`` say what those do; else the first reason.

    Of the root itself only the code is asked. ``biases``: whether every linear must have one;
    ``unread``: the name of a child that is never called.
    """
    known = root.__dict__.get("_tree_snapshot")
    if torch.compiler.is_compiling():
        return TreeSnapshot(root).why_not(biases, unread)
    if known is not None and known.unchanged():
        return None
    tree = TreeSnapshot(root)
    reason = tree.why_not(biases, unread)
    if reason is None:
        tree.remember(root)
        # An ordinary attribute of the module: the two are collected together.
        object.__setattr__(root, "_tree_snapshot", tree)
    return reason
