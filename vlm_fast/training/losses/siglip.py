"""SigLIP's pairwise sigmoid loss over the batches of all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.ops.argument_errors import no_double_backward, wrong_value
from vlm_fast.training.losses import rank_exchange
from vlm_fast.training.losses.contrastive import check_number, check_pairs
from vlm_fast.training.losses.cross_entropy import LOGITS_AT_ONCE
from vlm_fast.training.losses.rank_exchange import Sizes, World, ring_blocks, ring_shift


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    *,
    check_sizes: bool = True,
    group: Any = None,
) -> Tensor:
    """The sigmoid loss of SigLIP (arXiv 2303.15343, equation 1 and algorithm 1).

    ``-logsigmoid(label * (scale * image @ text + bias))``, where the label is 1 for a matching pair
    and -1 for all others, summed over all pairs and divided by the number of images. The sign of
    the bias is the one of algorithm 1.

    In a process group images stay on their rank and texts travel around the ring of ranks (section
    3.3), in their own dtype. A rank holds its own texts, the block it works on, the block that
    arrives, and some of the logits. Backward sends the texts around again, together with their
    gradients in float32 or wider, so every rank has to run it. The loss and gradients that data
    parallelism averages are those of one process with the whole batch. With one rank no collective
    is called.

    Batch sizes may differ between ranks, and may be 0.

    Args:
        image_features, text_features: ``(batch, features)`` each, normalised over the last
            dimension, in one dtype; row i of both is a matching pair.
        scale: factor of similarities, the exponential of SigLIP's learnable logarithm (which starts
            at log 10). A positive number or a floating 0-dimensional tensor. The value of a tensor
            on a GPU is not checked, because reading it would wait for the device.
        bias: added to scaled similarities; SigLIP starts at -10. A number or a tensor like
            ``scale``.
        check_sizes: gather sizes and dtypes of all ranks first, so that batches may differ. It is a
            small collective that the host reads; switch it off if batches and dtypes are known to
            be equal.
        group: the process group; None is the default one.

    Returns:
        A scalar, computed in float32 or wider, also under autocast. Differentiable once.

    Raises:
        TypeError: a feature is not a floating tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, the scale is not positive, the bias is not finite,
            or no rank has a row; on every rank, if ranks differ in features or dtype.
        RuntimeError: in backward with ``create_graph``.
    """
    name, wanted = "siglip_loss", "(batch, features)"
    check_pairs(name, image_features, text_features, 2, wanted)
    check_number(name, "scale", scale, above=0.0)
    check_number(name, "bias", bias, above=-math.inf)
    batch, features = image_features.shape
    world = rank_exchange.get_world(group)
    batches = [batch] * world.size
    if check_sizes:
        own: Sizes = {"batch": batch, "features": features, "dtype": text_features.dtype}
        facts = rank_exchange.gather_sizes(own, image_features.device, group)
        batches = facts.pop("batch")
        rank_exchange.check_same(name, facts)
    if sum(batches) == 0:
        wanted += ", one row at least"
        raise wrong_value(name, "image_features", image_features, wanted)
    device, wide = image_features.device, torch.promote_types(image_features.dtype, torch.float32)
    with torch.autocast(device.type, enabled=False):
        # Converted outside the Function, so that autograd returns gradients in the original dtype
        # and on the original device.
        numbers = (torch.as_tensor(x, dtype=wide, device=device).reshape(()) for x in (scale, bias))
        return _SigmoidLoss.apply(image_features, text_features, *numbers, batches, world, group)


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        batches: Sequence[int],
        world: World,
        group: Any,
    ) -> Tensor:
        ctx.save_for_backward(images, texts, scale, bias)
        ctx.ring = batches, world, group
        scaled, loss = images.to(scale.dtype) * scale, torch.zeros_like(scale)
        for rank, visiting in ring_blocks(texts, *ctx.ring):
            for _, opposed in _negated_logits(scaled, visiting, bias, own=rank == world.rank):
                loss -= F.logsigmoid(opposed.neg_()).sum()
        # The mean of this over ranks is the mean over all images, also if batches differ.
        return loss * (world.size / sum(batches))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # create_graph is set; `once_differentiable` would silently return constants
        if torch.is_grad_enabled():
            raise no_double_backward("siglip_loss")
        images, texts, scale, bias = ctx.saved_tensors
        batches, world, group = ctx.ring
        weight = grad * (world.size / sum(batches))
        scaled = images.to(scale.dtype) * scale
        dtexts, weighted = None, scaled * weight
        pull, dbias = torch.zeros_like(scaled), torch.zeros_like(bias)
        with torch.autocast(images.device.type, enabled=False):
            for rank, visiting in ring_blocks(texts, *ctx.ring):
                visiting, own = visiting.to(scale.dtype), rank == world.rank
                dvisiting = torch.zeros_like(visiting)
                for part, opposed in _negated_logits(scaled, visiting, bias, own=own):
                    slope = opposed.sigmoid_()  # derivative of the loss by the logit
                    if own:
                        slope.diagonal(part.start).neg_()
                    dbias += slope.sum()
                    pull[part].addmm_(slope, visiting)
                    dvisiting.addmm_(slope.t(), weighted[part])
                # Add the gradients that previous ranks computed for these texts; they travel behind
                # the texts.
                if dtexts is not None:
                    dvisiting += dtexts()
                dtexts = ring_shift(dvisiting, batches[(rank + 1) % world.size], world, group)
        assert dtexts is not None  # the ring is complete: these are gradients of this rank's texts
        dscale = (pull * images).sum() * weight
        dimages = pull.mul_(scale * weight).to(images.dtype)
        return dimages, dtexts().to(texts.dtype), dscale, dbias * weight, None, None, None


def _negated_logits(
    scaled: Tensor, texts: Tensor, bias: Tensor, *, own: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of images with their logits, multiplied by minus the label.

    Args:
        scaled: image features times the scale, ``(images, features)``.
        texts: ``(texts, features)``.
        bias: scalar.
        own: whether the texts belong to these images, so that the diagonal has label 1.
    """
    texts = texts.to(scaled.dtype)
    step = max(LOGITS_AT_ONCE["cuda" if texts.is_cuda else "cpu"] // max(len(texts), 1), 1)
    for start in range(0, len(scaled), step):
        part = slice(start, start + step)
        logits = (scaled[part] @ texts.t()).add_(bias)
        if own:
            logits.diagonal(start).neg_()
        yield part, logits
