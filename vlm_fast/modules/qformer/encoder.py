"""The layers of a Q-Former, run one after the other with what they share computed once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from vlm_fast.fallback import record_fallback
from vlm_fast.modules.parameter_access.module_calls import (
    only_output_hooks,
    unwrap_checkpoint,
    why_call_does_more,
)
from vlm_fast.modules.parameter_access.module_tree import TreeSnapshot, why_not_direct_tree
from vlm_fast.modules.qformer.layer import CALLED, KeysValues, LayerInputs, qformer_layer
from vlm_fast.modules.qformer.shared_inputs import (
    OP,
    ImageKeyValues,
    dropout_seeds,
    images_of_layers,
)


class QFormerLayer(nn.Module):
    """One layer, whose children have the names of the checkpoints.

    Called by `QFormerEncoder` with the arguments of `qformer_layer`, so that hooks, FSDP2 and
    wrappers for activation checkpointing stand around it as around any module.
    """

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, hidden: Tensor, *image_and_past: Tensor | None, inputs: LayerInputs) -> Any:
        return run_layer(self, hidden, *image_and_past, inputs=inputs)


class QFormerEncoder(nn.Module):
    """The layers, as ``layer``."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def forward(
        self,
        hidden: Tensor,
        image: Tensor | None,
        projected: ImageKeyValues | None,
        past: Sequence[KeysValues] | None,
        inputs: LayerInputs,
    ) -> tuple[Tensor, list[KeysValues]]:
        """See `run_layers`."""
        return run_layers(self, hidden, image, projected, past, inputs, lambda layer: layer)


def run_layers(
    encoder: Any,
    hidden: Tensor,
    image: Tensor | None,
    projected: ImageKeyValues | None,
    past: Sequence[KeysValues] | None,
    inputs: LayerInputs,
    called: Callable[[Any], Callable[..., Any]],
) -> tuple[Tensor, list[KeysValues]]:
    """All layers of an encoder.

    Args:
        encoder: a module with ``layer``.
        hidden: ``(batch, tokens, features)``.
        image: ``(images, keys, width)``, or ``projected``: its keys and values of all layers.
        past: keys and values of each layer that every token sees before its own.
        inputs: what is the same for all layers.
        called: what to call for a layer, with the arguments of `qformer_layer`.

    Returns:
        The tokens, and with ``inputs.keep`` keys and values of each layer's self-attention.
    """
    plain = [why_not_direct_tree(unwrap_checkpoint(layer)) is None for layer in encoder.layer]
    read = images_of_layers(
        encoder, hidden, image, projected, inputs.query_length, plain=all(plain)
    )
    seeds = dropout_seeds(encoder.layer, hidden)
    kept: list[KeysValues] = []
    for i, layer in enumerate(encoder.layer):
        of_image, is_projected = read[i]
        of_layer = dataclasses.replace(  # its own: checkpointing comes back to it
            inputs,
            projected=is_projected,
            seeds=None if seeds is None else seeds[i],
            plain=plain[i],
        )
        of_past = () if past is None else past[i]
        found = called(layer)(hidden, of_image, *of_past, inputs=of_layer)
        if inputs.keep:
            hidden, k, v = found
            kept.append((k, v))
        else:
            hidden = found
    return hidden, kept


def run_layer(layer: nn.Module, *tensors: Any, inputs: LayerInputs) -> Any:
    """`qformer_layer`, which calls the children of a layer that is not plain.

    Raises:
        ValueError: what lies between those children is not what is restated.
    """
    if not inputs.plain:  # FSDP2 has gathered by now what was sharded when the encoder looked
        reason = why_not_direct_tree(layer)
        if reason is not None:
            around = TreeSnapshot(layer).why_not_containers(CALLED)
            if around is not None:
                raise ValueError(f"vlm_fast.{OP}: {_not_called(around)}")
            record_fallback(OP, f"a layer calls its children: {reason}")
        inputs = dataclasses.replace(inputs, plain=reason is None)
    return qformer_layer(layer, *tensors, inputs=inputs)


def restated(layer: Any) -> Callable[..., Any]:
    """What to call in the place of a layer that is not a `QFormerLayer`: its forward, restated.

    The layer's own activation checkpointing, as transformers sets it, stands around it.

    Raises:
        ValueError: calling the layer does more than its forward, by hooks, sharding or a wrapper.
    """
    if not isinstance(layer._modules.get("attention"), nn.Module):
        wrapper = f"a layer has become a {type(layer).__name__}"
        raise ValueError(f"vlm_fast.{OP}: {_not_called(wrapper)}")
    refuse_unless_plainly_called(layer)
    call = functools.partial(run_layer, layer)
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return lambda *tensors, inputs: layer._gradient_checkpointing_func(
            functools.partial(call, inputs=inputs), *tensors
        )
    return call


def refuse_unless_plainly_called(module: nn.Module) -> None:
    """ValueError if calling a module does more than its forward, which is restated."""
    watched = only_output_hooks(module._forward_hooks)
    reason = why_call_does_more(module, ignore_forward_hooks=watched)
    if reason is not None:
        raise ValueError(f"vlm_fast.{OP}: {_not_called(f'{type(module).__name__}: {reason}')}")


def _not_called(reason: str) -> str:
    return f"it computes what modules do without calling them, and would lose something ({reason})"
