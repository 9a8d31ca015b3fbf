"""A Q-Former's layer as one op, with what it reads of the layer's modules."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.parameter_access.activation import activation_name
from vlm_fast.modules.parameter_access.attention_settings import (
    attention_dropout_switch,
    attention_scale,
)
from vlm_fast.modules.parameter_access.module_tree import derived
from vlm_fast.modules.qformer.layer_inputs import LayerInputs
from vlm_fast.ops.autocast import autocast_device


class LayerReading(NamedTuple):
    """What `vlm_fast.ops.qformer_layer` takes of a layer.

    Attributes:
        parameters: as the op takes them.
        keys_values: weights of the cross-attention's keys and values, then their biases; empty for
            a layer without one, and without query tokens.
        options: heads, scale, eps and activation.
        dropouts: for the outputs and for the attentions, the probability of dropout and the modules
            whose modes say whether it is active; no modules if the probability is 0.
    """

    parameters: list[Tensor]
    keys_values: list[Tensor]
    options: dict[str, Any]
    dropouts: tuple[tuple[float, list[nn.Module]], tuple[float, list[nn.Module]]]


def run_as_one_op(
    layer: Any, hidden: Tensor, image: Tensor | None, inputs: LayerInputs
) -> Tensor | None:
    """The result of a layer whose parameters can be read directly, from one op.

    None if the op cannot compute the layer: it has a bias of the image's scores, one sequence with
    text for several images, blocks or modes that differ, or autocast.
    """
    sequences, tokens, _ = hidden.shape
    queries, text = inputs.query_length, tokens - inputs.query_length
    if torch.jit.is_tracing():  # sizes are tensors
        queries, text = int(queries), int(text)
    if (
        tokens == 0
        or text < 0
        or inputs.image_bias is not None
        or (text and sequences == 1 and image is not None and image.shape[0] != 1)
        or torch.is_autocast_enabled(autocast_device(hidden))
    ):
        return None
    reading: LayerReading | None = derived(layer, _READINGS[bool(queries > 0), bool(text > 0)])
    if reading is None or reading.parameters[0].dtype is not hidden.dtype:
        return None
    dropout, attention_dropout = map(_active, reading.dropouts)
    if dropout is None or attention_dropout is None:
        return None
    crosses = bool(reading.keys_values)
    if not crosses:
        image = None
    elif image is None:
        return None
    elif not inputs.projected:
        image = ops.stacked_linear(image, reading.keys_values)
    options, seeds = reading.options, None
    if text:
        options = {**options, "text": text}
    if dropout or attention_dropout:
        options = {**options, "dropout": dropout, "attention_dropout": attention_dropout}
        seeds = inputs.seeds
    return ops.qformer_layer(
        hidden, image, reading.parameters, inputs.bias, inputs.key_mask,
        inputs.image_mask if crosses else None, seeds, **options,
    )  # fmt: skip


def reading_of(layer: Any, has_queries: bool, has_text: bool) -> LayerReading | None:
    """The `LayerReading` of a layer; None if dtypes, or the settings of its blocks, differ."""
    blocks = [layer.attention]
    cross = getattr(layer, "crossattention", None) if has_queries else None
    if cross is not None:
        blocks.append(cross)
    attentions = [block.attention for block in blocks]
    mlps = [(layer.intermediate_query, layer.output_query)] if has_queries else []
    mlps += [(layer.intermediate, layer.output)] if has_text else []
    outputs = [*[block.output for block in blocks], *[output for _, output in mlps]]
    qkv = [attentions[0].query, attentions[0].key, attentions[0].value]
    parameters = [*[linear.weight for linear in qkv], *[linear.bias for linear in qkv]]
    parameters += _output_parameters(outputs[0])
    keys_values: list[Tensor] = []
    if cross is not None:
        query, key, value = attentions[1].query, attentions[1].key, attentions[1].value
        keys_values = [key.weight, value.weight, key.bias, value.bias]
        parameters += [query.weight, query.bias, *_output_parameters(outputs[1])]
    for intermediate, output in mlps:
        first = intermediate.dense
        parameters += [first.weight, first.bias, *_output_parameters(output)]
    activations = [activation_name(intermediate.intermediate_act_fn) for intermediate, _ in mlps]
    settings = [(a.num_attention_heads, attention_scale(a)) for a in attentions]
    eps = [output.LayerNorm.eps for output in outputs]
    switches = [(output.dropout, float(output.dropout.p)) for output in outputs]
    of_attentions = [attention_dropout_switch(a) for a in attentions]
    for same in (settings, eps, activations, [p for _, p in switches],
                 [p for _, p in of_attentions], [p.dtype for p in parameters]):  # fmt: skip
        if any(value != same[0] for value in same):
            return None
    (heads, scale), dropouts = settings[0], (_switch(switches), _switch(of_attentions))
    options = dict(heads=heads, scale=scale, eps=eps[0], activation=activations[0])
    return LayerReading(parameters, keys_values, options, dropouts)


_READINGS = {  # by whether there are queries and text
    kind: functools.partial(reading_of, has_queries=kind[0], has_text=kind[1])
    for kind in ((True, False), (True, True), (False, True))
}


def _output_parameters(output: Any) -> list[Tensor]:
    dense, norm = output.dense, output.LayerNorm
    return [dense.weight, dense.bias, norm.weight, norm.bias]


def _switch(found: list[tuple[nn.Module, float]]) -> tuple[float, list[nn.Module]]:
    """The probability, and the modules that turn dropout on."""
    p = found[0][1]
    return p, [module for module, _ in found] if p > 0 else []


def _active(dropout: tuple[float, list[nn.Module]]) -> float | None:
    """The probability of dropout now; None if it is active in some modules only."""
    p, modules = dropout
    if not modules:
        return 0.0
    first = modules[0].training
    for module in modules:
        if module.training is not first:
            return None
    return p if first else 0.0


def dropout_switches(layer: Any) -> list[nn.Module]:
    """The modules of a layer whose training mode turns on a dropout of a probability above 0."""
    found = []
    for name in ("attention", "crossattention", "output_query", "output"):
        part = getattr(layer, name, None)
        if part is None:
            continue
        if name.endswith("attention"):
            found.append(attention_dropout_switch(part.attention))
            part = part.output
        found.append((part.dropout, float(getattr(part.dropout, "p", 0))))
    return [module for module, p in found if p > 0]
