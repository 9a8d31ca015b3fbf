"""Run the layers of a Q-Former one after the other; what they share is computed once."""

from __future__ import annotations

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
from vlm_fast.modules.parameter_access.module_tree import ModuleTree, why_not_direct_tree
from vlm_fast.modules.parameter_access.module_view import view_of
from vlm_fast.modules.qformer.layer import CALLED_CHILDREN, qformer_layer
from vlm_fast.modules.qformer.layer_inputs import KeysValues, LayerInputs
from vlm_fast.modules.qformer.shared_inputs import (
    OP,
    ImageKeyValues,
    dropout_seeds,
    image_readers,
)
from vlm_fast.modules.qformer.whole_layer import dropout_switches


class QFormerLayer(nn.Module):
    """One layer of a `QFormer`, with the child names of the checkpoints.

    `QFormerEncoder` calls it as a module, so hooks, FSDP2 and wrappers for activation checkpointing
    work as usual.
    """

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, hidden: Tensor, *image_and_past: Tensor | None, inputs: LayerInputs) -> Any:
        """See `qformer_layer`."""
        return run_layer(self, hidden, *image_and_past, inputs=inputs)


class QFormerEncoder(nn.Module):
    """The layers of a `QFormer`, in the child ``layer``."""

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
    """Run all layers of an encoder on ``hidden``.

    Args:
        encoder: a module with the children ``layer``.
        hidden: ``(batch, tokens, features)``.
        image: ``(images, keys, width)``, or None.
        projected: keys and values of the image for all layers, instead of ``image``.
        past: for each layer keys and values of earlier tokens, which every token attends to.
        inputs: the inputs that are the same for all layers.
        called: maps a layer to the function that runs it, with the arguments of `qformer_layer`.

    Returns:
        The tokens; with ``inputs.keep`` the keys and values of each layer's self-attention, else an
        empty list.
    """
    layers = list(encoder.layer)
    inner = [unwrap_checkpoint(layer) for layer in layers]
    plain = [why_not_direct_tree(layer) is None for layer in inner]
    views = [view_of(layer) if p else layer for layer, p in zip(inner, plain, strict=True)]
    read, is_projected = image_readers(views).inputs(image, projected, plain=all(plain))
    switches = [module for view in views for module in dropout_switches(view)]
    seeds = dropout_seeds(switches, len(layers), hidden)
    kept: list[KeysValues] = []
    shared = inputs.for_layer(is_projected, None, True)
    for i, layer in enumerate(layers):
        layer_inputs = shared
        if seeds is not None or not plain[i]:
            of_layer = None if seeds is None else seeds[i]
            layer_inputs = inputs.for_layer(is_projected, of_layer, plain[i])
        layer_past = () if past is None else past[i]
        found = called(layer)(hidden, read[i], *layer_past, inputs=layer_inputs)
        if inputs.keep:
            hidden, k, v = found
            kept.append((k, v))
        else:
            hidden = found
    return hidden, kept


def run_layer(layer: nn.Module, *tensors: Any, inputs: LayerInputs) -> Any:
    """Run `qformer_layer`; it calls the children if their parameters cannot be read directly.

    Raises:
        ValueError: a module around these children does more than is known, e.g. has hooks.
    """
    if not inputs.plain:  # FSDP2 has gathered parameters since the encoder checked
        reason = why_not_direct_tree(layer)
        if reason is not None:
            around = ModuleTree(layer).why_not_containers(CALLED_CHILDREN)
            if around is not None:
                raise ValueError(f"vlm_fast.{OP}: {_would_lose(around)}")
            record_fallback(OP, f"a layer calls its children: {reason}")
        inputs = inputs.for_layer(inputs.projected, inputs.seeds, reason is None)
    return qformer_layer(layer, *tensors, inputs=inputs)


def mirrored_forward(layer: Any) -> Callable[..., Any]:
    """The function that runs a layer of transformers instead of calling it.

    It applies the activation checkpointing that transformers has set on the layer.

    Raises:
        ValueError: hooks, sharding or a wrapper make a call of the layer do more than its forward.
    """
    if not isinstance(layer._modules.get("attention"), nn.Module):
        wrapper = f"a layer has become a {type(layer).__name__}"
        raise ValueError(f"vlm_fast.{OP}: {_would_lose(wrapper)}")
    raise_if_call_does_more(layer)
    call = functools.partial(run_layer, layer)
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return lambda *tensors, inputs: layer._gradient_checkpointing_func(
            functools.partial(call, inputs=inputs), *tensors
        )
    return call


def raise_if_call_does_more(module: nn.Module) -> None:
    """Raise ValueError if calling a module does more than its forward, which is not called."""
    watched = only_output_hooks(module._forward_hooks)
    reason = why_call_does_more(module, ignore_forward_hooks=watched)
    if reason is not None:
        raise ValueError(f"vlm_fast.{OP}: {_would_lose(f'{type(module).__name__}: {reason}')}")


def _would_lose(reason: str) -> str:
    return f"it computes what modules do without calling them, and would lose something ({reason})"
