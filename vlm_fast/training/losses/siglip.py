"""SigLIP's loss over the batches of all ranks: every pair of an image and a text on its own."""

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
from vlm_fast.training.losses.cross_entropy import LOGITS
from vlm_fast.training.losses.rank_exchange import Facts, World, pass_on, visits


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

    ``-logsigmoid(label * (scale * image @ text + bias))``, where the label is 1 for an image and
    its text and -1 for all others, summed over all pairs and divided by the number of images. The
    sign of the bias is that of algorithm 1.

    In a process group images stay where they are and texts travel around the ring of ranks
    (section 3.3), in their own dtype: a rank holds its own texts, those that it works on and those
    that arrive, and a part of the logits of these. Backward sends them around again, together with
    their gradients in float32 at least, and so every rank has to run it. What data parallelism
    averages, the loss and the gradients, is that of one process with the whole batch. Without a
    group, or with one rank, no collective is called.

    Batches may differ among ranks, and a rank may have none: a last batch, or text without images.

    Args:
        image_features, text_features: ``(batch, features)`` each, normalised over the last
            dimension; a text for each image, of one dtype.
        scale: what multiplies similarities: the exponential of SigLIP's learnable logarithm, which
            starts at log 10. A positive number, or a floating tensor of no dimension. A tensor on a
            GPU is not looked at: that would wait for the device.
        bias: what is added; SigLIP's starts at -10. A number or a tensor, as the scale.
        check_sizes: gather the sizes and dtypes of all ranks first, so that batches may differ. A
            small collective that the host reads; leave it out where batches and dtypes are even.
        group: the process group; None is the default one.

    Returns:
        A scalar, computed in float32 at least, also under autocast; differentiable once: backward
        with ``create_graph`` raises RuntimeError.

    Raises:
        TypeError: a feature is not a floating tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, a scale that is not positive, a bias that is not
            finite; no rank has a row; ranks differ in features or in dtype, on every rank.
    """
    name, wanted = "siglip_loss", "(batch, features)"
    check_pairs(name, image_features, text_features, 2, wanted)
    check_number(name, "scale", scale, above=0.0)
    check_number(name, "bias", bias, above=-math.inf)
    batch, features = image_features.shape
    world = rank_exchange.world_of(group)
    batches = [batch] * world.size
    if check_sizes:
        own: Facts = {"batch": batch, "features": features, "dtype": text_features.dtype}
        facts = rank_exchange.facts_of_ranks(own, image_features.device, group)
        batches = facts.pop("batch")
        rank_exchange.refuse_different(name, facts)
    if sum(batches) == 0:
        wanted += ", one row at least"
        raise wrong_value(name, "image_features", image_features, wanted)
    device, wide = image_features.device, torch.promote_types(image_features.dtype, torch.float32)
    with torch.autocast(device.type, enabled=False):
        # Here, so that autograd returns gradients in the dtype and on the device they came from.
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
        for rank, visiting in visits(texts, *ctx.ring):
            for _, opposed in _opposed(scaled, visiting, bias, own=rank == world.rank):
                loss -= F.logsigmoid(opposed.neg_()).sum()
        # So the mean over ranks is that over all images, however many each rank has.
        return loss * (world.size / sum(batches))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph; once_differentiable would give constants
            raise no_double_backward("siglip_loss")
        images, texts, scale, bias = ctx.saved_tensors
        batches, world, group = ctx.ring
        weight = grad * (world.size / sum(batches))
        scaled = images.to(scale.dtype) * scale
        dtexts, weighted = None, scaled * weight
        pull, dbias = torch.zeros_like(scaled), torch.zeros_like(bias)
        with torch.autocast(images.device.type, enabled=False):
            for rank, visiting in visits(texts, *ctx.ring):
                visiting, own = visiting.to(scale.dtype), rank == world.rank
                dvisiting = torch.zeros_like(visiting)
                for part, opposed in _opposed(scaled, visiting, bias, own=own):
                    slope = opposed.sigmoid_()  # of the loss by the logit
                    if own:
                        slope.diagonal(part.start).neg_()
                    dbias += slope.sum()
                    pull[part].addmm_(slope, visiting)
                    dvisiting.addmm_(slope.t(), weighted[part])
                # What the ranks before have found of these texts has come after them.
                if dtexts is not None:
                    dvisiting += dtexts()
                dtexts = pass_on(dvisiting, batches[(rank + 1) % world.size], world, group)
        assert dtexts is not None  # at home, after the last rank
        dscale = (pull * images).sum() * weight
        dimages = pull.mul_(scale * weight).to(images.dtype)
        return dimages, dtexts().to(texts.dtype), dscale, dbias * weight, None, None, None


def _opposed(
    scaled: Tensor, texts: Tensor, bias: Tensor, *, own: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Logits of some images at a time, with the sign against that of the label.

    ``own``: the texts are those of the images, so that the diagonal has the label 1.
    """
    texts = texts.to(scaled.dtype)
    step = max(LOGITS["cuda" if texts.is_cuda else "cpu"] // max(len(texts), 1), 1)
    for start in range(0, len(scaled), step):
        part = slice(start, start + step)
        logits = (scaled[part] @ texts.t()).add_(bias)
        if own:
            logits.diagonal(start).neg_()
        yield part, logits
