"""Settings of an attention module of transformers: scale, dropout and implementation."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from vlm_fast.modules.parameter_access.guard import Guard
from vlm_fast.modules.parameter_access.original_code import class_before_patch
from vlm_fast.ops.transforms import constant_while_compiling

# Values of config._attn_implementation whose functions compute softmax attention.
_IMPLEMENTATIONS = {
    None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4",
    "flex_attention", "vlm_fast",
}  # fmt: skip

_STORED = "_attn_implementation_internal"  # where a config keeps its _attn_implementation


def active_attention_dropout(attention: Any) -> float:
    """The probability with which attention weights are dropped now; 0 in eval mode."""
    switch, p = attention_dropout_switch(attention)
    return p if switch.training else 0.0


def attention_dropout_switch(attention: Any) -> tuple[nn.Module, float]:
    """The module that drops attention weights in training mode, and the probability.

    Some releases have a child ``dropout``, others an attribute ``attention_dropout``.
    """
    dropout = getattr(attention, "dropout", None)
    if isinstance(dropout, nn.Module):
        return dropout, float(dropout.p)  # type: ignore[arg-type]
    return attention, float(attention.attention_dropout)


def attention_scale(attention: Any) -> float:
    """The factor of the scores before the softmax."""
    scaling = getattr(attention, "scaling", None)
    if scaling is not None:
        return float(scaling)
    d = getattr(attention, "head_dim", None)
    return float((attention.attention_head_size if d is None else d) ** -0.5)


def has_attention_choice(module: nn.Module) -> bool:
    """Whether the config of a module selects its attention implementation."""
    return hasattr(module.__dict__.get("config"), "_attn_implementation")


def chosen_attention(module: Any) -> tuple[str | None, str]:
    """The name of the implementation that a module uses, and the module that defines its eager."""
    return module.config._attn_implementation, class_before_patch(module).__module__


def attention_function(name: str | None, eager_module: str) -> Any:
    """The function that transformers calls for the attention implementation of this name."""
    if name in (None, "eager"):
        return getattr(sys.modules.get(eager_module), "eager_attention_forward", None)
    modeling = sys.modules.get("transformers.modeling_utils")
    functions = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", None)
    return None if functions is None else functions.get(name)


@constant_while_compiling
def why_unknown_attention(name: str | None, eager_module: str) -> str | None:
    """Why this attention implementation may compute something else than softmax attention."""
    if name not in _IMPLEMENTATIONS:
        return f"its attention is {name!r}, which was not read"
    origin = getattr(attention_function(name, eager_module), "__module__", "transformers.")
    if not origin.startswith(("transformers.", "vlm_fast.")):
        return f"the attention {name or 'eager'!r} has been replaced by one of {origin}"
    return None


def record_attention(guard: Guard, module: Any) -> None:
    """Record which attention a module with a config uses."""
    name, eager_module = chosen_attention(module)
    own = vars(module.config)  # an attribute of a config takes microseconds to read
    if _STORED in own:
        guard.record("item", own, _STORED, own[_STORED])
    else:
        guard.record("equal attribute", module.config, "_attn_implementation", name)
    function = attention_function(name, eager_module)
    guard.record("call", attention_function, (name, eager_module), function)
