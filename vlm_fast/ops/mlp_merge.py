"""A projector whose rows appear nowhere but in their slots of the language model's embeddings."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels import _hopper
from vlm_fast.kernels import image_tokens as kernels
from vlm_fast.ops.argument_errors import wrong_value
from vlm_fast.ops.declaration import Cost, linear_op, nbytes
from vlm_fast.ops.image_tokens import (
    check_count,
    check_sequence,
    likeness,
    merge_image_tokens,
    no_rows,
    placeholders,
    row_count,
)
from vlm_fast.ops.mlp import activated, check, gradients, mlp, unsupported


@linear_op
def mlp_merge(
    inputs_embeds: Tensor,
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor | None,
    weight_2: Tensor,
    bias_2: Tensor | None,
    image_mask: Tensor,
    *,
    activation: str = "gelu",
    saved: str = "preactivation",
) -> Tensor:
    """``merge_image_tokens(inputs_embeds, mlp(x, ...), image_mask)`` in one call.

    Where the optional GEMM for Hopper serves, the second linear writes its rows straight into their
    slots; elsewhere this is the two ops.

    Args:
        inputs_embeds, image_mask: as of `merge_image_tokens`.
        x, weight_1, bias_1, weight_2, bias_2, activation, saved: as of `mlp`; ``weight_2`` is
            ``(hidden of inputs_embeds, hidden of the projector)``.

    Returns:
        ``(batch, sequence, hidden)`` in the dtype of ``inputs_embeds``, autocast or not;
        freshly allocated.

    Raises:
        TypeError, ValueError: as of both ops.
    """
    rows = mlp.reference(x, weight_1, bias_1, weight_2, bias_2, activation=activation)
    return merge_image_tokens.reference(inputs_embeds, rows, image_mask)


mlp_merge.leaves_alone("inputs_embeds")


@mlp_merge.accepts
def accepts(inputs_embeds, x, weight_1, bias_1, weight_2, bias_2, image_mask, *, activation, saved):
    name = "mlp_merge"
    check_sequence(name, "inputs_embeds", inputs_embeds, image_mask)
    check(name, x, weight_1, bias_1, weight_2, bias_2, activation, saved)
    if weight_2.shape[0] != inputs_embeds.shape[-1]:
        wanted = f"({inputs_embeds.shape[-1]}, *) to match inputs_embeds[..., hidden]"
        raise wrong_value(name, "weight_2", weight_2, wanted)
    if x.device != inputs_embeds.device:
        raise wrong_value(name, "x", x, f"{inputs_embeds.device}, where inputs_embeds is")
    if row_count(x) > image_mask.numel():
        wanted = f"at most {image_mask.numel()} rows, the positions of image_mask"
        raise wrong_value(name, "x", x, wanted)
    return inputs_embeds, x, weight_1, bias_1, weight_2, bias_2, image_mask


@mlp_merge.requires
def requires(
    inputs_embeds, x, weight_1, bias_1, weight_2, bias_2, image_mask, *, activation, saved
):
    return no_rows(inputs_embeds) or unsupported(x)


@mlp_merge.forward
def forward(
    needs, inputs_embeds, x, weight_1, bias_1, weight_2, bias_2, image_mask, *, activation, saved
):
    of_mlp = mlp.Needs(*needs[1:-1])
    rows, (hidden, inner) = row_count(x), weight_2.shape
    slots, found = kernels.image_token_slots(image_mask, rows)
    check_count("mlp_merge", "x", rows, found)
    h, kept = activated(of_mlp, x, weight_1, bias_1, weight_2, activation, saved)

    def plain() -> Tensor:
        y = F.linear(h, weight_2, bias_2)
        return kernels.merge_image_tokens(inputs_embeds, [y], image_mask, slots)

    def fused(config: int) -> Tensor:
        out = inputs_embeds.new_empty(inputs_embeds.shape)
        kernels.copy_text(kernels.row_matrix(inputs_embeds), image_mask, out)
        _hopper.linear_scatter(
            config, h.reshape(rows, inner), weight_2, bias_2, slots, out.view(-1, hidden)
        )
        return out

    same = inputs_embeds.dtype is h.dtype
    out = _hopper.LINEAR_SCATTER(h, rows, (inner, hidden), plain, fused) if same else plain()
    return out, (
        image_mask if needs.inputs_embeds else None,
        slots if any(needs) else None,
        likeness(x) if any(of_mlp) else None,
        *kept,
    )


@mlp_merge.backward
def backward(needs, kept, dy, *, activation, saved):
    kept = iter(kept)
    mask, slots, shape = itertools.islice(kept, 3)
    dembeds = kernels.clear_image_tokens(dy, mask, slots) if needs.inputs_embeds else None
    of_mlp = mlp.Needs(*needs[1:-1])
    if not any(of_mlp):
        return (dembeds, *[None] * 6)
    drows = shape.new_empty(*shape.shape[:-1], dy.shape[-1])
    kernels.gather_image_tokens(dy, slots, 0, drows)
    found = gradients(of_mlp, kept, drows, activation, saved)
    return (dembeds, *found, None)


@mlp_merge.cost
def cost(inputs_embeds, x, weight_1, bias_1, weight_2, bias_2, image_mask, *, activation, saved):
    of_mlp = mlp.cost_of(x, weight_1, bias_1, weight_2, bias_2, activation=activation, saved=saved)
    rows = row_count(x) * weight_2.shape[0] * inputs_embeds.element_size()
    # The rows are written once, in their places; the text is read and written.
    moved = 2 * (nbytes(inputs_embeds) - rows) + nbytes(image_mask)
    return Cost(
        of_mlp.forward_flops, of_mlp.forward_bytes + moved,
        of_mlp.backward_flops, of_mlp.backward_bytes + moved + 2 * rows,
    )  # fmt: skip


@mlp_merge.inputs(
    test=[
        dict(batch=1, sequence=1, images=1, tokens=1, inner=1, middle=1, hidden=1),
        dict(batch=2, sequence=5, images=1, tokens=2, inner=17, middle=9, hidden=24),
        dict(
            batch=2, sequence=14, images=2, tokens=5, inner=40, middle=100, hidden=33,
            activation="silu", saved="input",
        ),
    ],
    bench={
        "LLaVA-1.5-7B, 1 x 1024": dict(
            batch=1, sequence=1024, images=1, tokens=576, inner=1024, middle=4096, hidden=4096
        ),
        "LLaVA-1.5-7B, 8 x 1024": dict(
            batch=8, sequence=1024, images=1, tokens=576, inner=1024, middle=4096, hidden=4096
        ),
    },
)  # fmt: skip
def inputs(batch, sequence, images, tokens, inner, middle, hidden):
    return (
        torch.randn(batch, sequence, hidden),
        torch.randn(batch * images, tokens, inner),
        torch.randn(middle, inner) * inner**-0.5,
        torch.randn(middle) * 0.1,
        torch.randn(hidden, middle) * middle**-0.5,
        torch.randn(hidden) * 0.1,
        placeholders(batch, sequence, images, tokens),
    )
