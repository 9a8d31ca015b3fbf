"""What the patched encoder of a Q-Former computes once and uses in every call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlm_fast.modules.parameter_access.guard import Guard
from vlm_fast.modules.parameter_access.module_calls import unwrap_checkpoint
from vlm_fast.modules.parameter_access.module_tree import (
    DIRECT_TREE,
    tree_parameters,
    why_tree_dtypes_differ,
)
from vlm_fast.modules.parameter_access.module_view import view_of
from vlm_fast.modules.parameter_access.remembered import recall, remember, stored
from vlm_fast.modules.qformer.shared_inputs import ImageReaders, image_readers
from vlm_fast.modules.qformer.whole_layer import dropout_switches

_STORED = "_encoder_plan"  # where the plan is stored on the encoder


class EncoderPlan(NamedTuple):
    """What the calls of an encoder's layers have in common as long as no layer changes.

    Attributes:
        layers: the layers, which are called as modules.
        views: the same layers for reading, without a wrapper around them, see `ModuleView`.
        absent: for each layer the arguments, all None, between hidden states and image features.
        dtypes: the dtypes of all parameters, each once.
        image: what the layers read of an image.
        dropouts: the modules whose training mode turns a dropout on.
    """

    layers: list[Any]
    views: list[Any]
    absent: list[list[None]]
    dtypes: list[torch.dtype]
    image: ImageReaders
    dropouts: list[nn.Module]

    def why_not_dtypes(self, hidden: Tensor, image: Tensor | None) -> str | None:
        """Why a layer cannot compute in one dtype, or None."""
        if (
            self.dtypes == [hidden.dtype]
            and (image is None or image.dtype is hidden.dtype)
            and not torch.is_autocast_enabled(hidden.device.type)
        ):
            return None
        reasons = (why_not_dtypes(layer, hidden, image) for layer in self.layers)
        return next((reason for reason in reasons if reason is not None), None)


def plan_of(encoder: Any) -> EncoderPlan:
    """The plan of an encoder; a new one while compiling, and if it cannot be stored."""
    found: EncoderPlan | None = stored(encoder, _STORED)
    return _new_plan(encoder) if found is None else found


def recalled_plan(encoder: Any) -> EncoderPlan | None:
    """The stored plan of an encoder, if nothing that it depends on has changed; else None."""
    found: EncoderPlan | None = recall(encoder, _STORED)
    return found


def remember_plan(encoder: Any) -> None:
    """Store the plan of an encoder whose ``why_not`` has given None."""
    if not torch.compiler.is_compiling():
        remember(encoder, _STORED, _new_plan(encoder), lambda: _guard_of(encoder))


def _guard_of(encoder: Any) -> Guard:
    layers, config = list(encoder.layer), encoder.config
    guard = Guard(encoder, layers)
    for layer in map(unwrap_checkpoint, layers):
        guard.include(layer, DIRECT_TREE)
        for name in ("attention", "crossattention"):
            if hasattr(layer, name):  # heads are pruned in place
                guard.record("false item", vars(getattr(layer, name)), "pruned_heads")
    own = vars(config)  # an attribute of a config takes microseconds to read
    if "num_hidden_layers" in own:
        guard.record("item", own, "num_hidden_layers", own["num_hidden_layers"])
    else:
        guard.record("equal attribute", config, "num_hidden_layers", config.num_hidden_layers)
    guard.record("false item", own, "gradient_checkpointing")
    return guard


def _new_plan(encoder: Any) -> EncoderPlan:
    layers = list(encoder.layer)
    inner = [unwrap_checkpoint(layer) for layer in layers]
    positional = [layer.argument_names["forward"].positional for layer in inner]
    absent = [[None] * (names.index("encoder_hidden_states") - 1) for names in positional]
    views = [view_of(layer) for layer in inner]
    dtypes = {p.dtype: None for layer in inner for p in tree_parameters(layer)}
    dropouts = [module for view in views for module in dropout_switches(view)]
    return EncoderPlan(layers, views, absent, list(dtypes), image_readers(views), dropouts)


def why_not_dtypes(layer: Any, hidden: Tensor, image: Tensor | None) -> str | None:
    """Why a layer cannot compute in one dtype, or None.

    Under autocast parameters may be float32 or of autocast's dtype.
    """
    layer, device = unwrap_checkpoint(layer), hidden.device.type
    if not torch.is_autocast_enabled(device):
        return why_tree_dtypes_differ(layer, hidden, image)
    taken = (torch.float32, torch.get_autocast_dtype(device))
    found = next((p.dtype for p in tree_parameters(layer) if p.dtype not in taken), None)
    return None if found is None else f"it has parameters in {found} under autocast to {taken[1]}"
