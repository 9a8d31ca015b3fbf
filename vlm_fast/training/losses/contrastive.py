"""Image-text contrast over the batches of all ranks, and the negatives it finds hard."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.ops.max_similarity import max_similarity
from vlm_fast.training.losses.rank_exchange import (
    Sizes,
    all_to_all_rows,
    check_same_on_ranks,
    gather_rows,
    get_world,
)


class ContrastiveOutput(NamedTuple):
    """The contrastive loss, and the logits of this rank's rows against all of the other kind."""

    loss: Tensor
    similarity_i2t: Tensor
    similarity_t2i: Tensor


def itc_loss(
    image_features: Tensor,
    text_features: Tensor,
    temperature: float | Tensor,
    *,
    label_smoothing: float = 0.0,
    local_loss: bool = True,
    check_sizes: bool = True,
    group: Any = None,
) -> ContrastiveOutput:
    """Image-text contrast of BLIP-2 (arXiv 2301.12597, section 3.2).

    A similarity is the largest over the queries of an image (`ops.max_similarity`), divided by
    the temperature; the loss is the mean of the cross entropies of images among all texts and of
    texts among all images, the own pair being the target.

    In a process group each rank scores its images against the texts of all ranks. Of images only
    these scores travel: ``ranks * batch ** 2`` numbers, and not ``queries * features`` a row.
    Gradients cross ranks, so that what data parallelism averages is the gradient of one process
    with the whole batch. Without a group, or with one rank, no collective is called.

    Args:
        image_features: ``(batch, queries, features)``, normalised over the last dimension.
        text_features: ``(batch, features)``, normalised.
        temperature: a positive number, or a floating tensor of one element, as a learnable
            parameter is. A tensor on a GPU is not looked at: that would wait for the device.
        label_smoothing: from 0 to 1; LAVIS trains with 0.1.
        local_loss: each rank takes the loss of its own rows; else all ranks that of all rows, so
            that every rank reports the same number. Averaged gradients are the same.
        check_sizes: gather sizes and dtypes first and raise everywhere, if ranks differ, rather
            than wait for ever or read one dtype as another. A small collective that the host reads;
            leave it out where batches and dtypes are even.
        group: the process group; None is the default one.

    Returns:
        The loss, and the logits of own images and of own texts, ``(batch, ranks * batch)`` each.
        All in float32 at least, and differentiable.

    Raises:
        TypeError: a feature is not a floating tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, a temperature that is not positive, smoothing
            out of range; ranks differ in their sizes or dtypes, on every rank.
    """
    _check(image_features, text_features, temperature, label_smoothing)
    batch, queries, features = image_features.shape
    world = get_world(group)
    if check_sizes:
        facts: Sizes = {"batch": batch, "queries": queries, "features": features}
        facts["dtype"] = image_features.dtype
        check_same_on_ranks("itc_loss", facts, image_features.device, group)
    if batch == 0:
        wanted = "(batch, queries, features), one row at least"
        raise wrong_value("itc_loss", "image_features", image_features, wanted)
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(())
    wide = torch.promote_types(image_features.dtype, torch.float32)
    similarity = max_similarity(image_features, gather_rows(text_features, group)).to(wide)
    own = slice(world.rank * batch, (world.rank + 1) * batch)
    if local_loss:
        # The texts' rows are columns that other ranks hold: a block from each.
        even = [batch] * world.size
        blocks = all_to_all_rows(similarity.t(), even, even, group)
        i2t = similarity / temperature
        t2i = blocks.unflatten(0, (world.size, batch)).transpose(0, 1).flatten(1) / temperature
        target = torch.arange(own.start, own.stop, device=i2t.device)
        loss = _mean_cross_entropy(i2t, t2i, target, label_smoothing)
        return ContrastiveOutput(loss, i2t, t2i)
    logits = gather_rows(similarity, group) / temperature
    target = torch.arange(len(logits), device=logits.device)
    loss = _mean_cross_entropy(logits, logits.t(), target, label_smoothing)
    return ContrastiveOutput(loss, logits[own], logits.t()[own])


def hard_negatives(
    similarity: Tensor, rank_offset: int, generator: torch.Generator | None = None
) -> Tensor:
    """One wrong partner for each row, drawn with the probabilities of ``softmax(similarity)``.

    The own pair is left out. Where all others are -inf, each of them is as likely. Drawn by the
    largest of logits with Gumbel noise, which is the distribution of ``torch.multinomial`` without
    its normalisation and without a host read.

    Args:
        similarity: ``(batch, ranks * batch)`` logits: `Contrast.similarity_i2t` chooses texts,
            ``similarity_t2i`` images.
        rank_offset: the column of the first row's own pair: rank * batch.
        generator: of the device of ``similarity``.

    Returns:
        ``(batch,)`` int64, numbers of columns.

    Raises:
        TypeError: similarity is not a floating tensor.
        ValueError: it is not ``(batch, columns)``, the own pairs lie beyond it, or there is but
            one column, which leaves no negative.
    """
    name = "hard_negatives"
    if not isinstance(similarity, Tensor):
        raise not_a_tensor(name, "similarity", similarity)
    if similarity.ndim != 2 or similarity.shape[1] == 1:
        raise wrong_value(name, "similarity", similarity, "(batch, columns), 2 columns at least")
    if not similarity.is_floating_point():
        raise wrong_type(name, "similarity", similarity, "a floating dtype")
    batch, columns = similarity.shape
    if not 0 <= rank_offset <= columns - batch:
        raise wrong_value(name, "rank_offset", rank_offset, f"0 to {columns - batch}")
    wide = torch.promote_types(similarity.dtype, torch.float32)
    logits = similarity.detach().to(wide, copy=True)
    own = logits.diagonal(rank_offset)
    own.fill_(-math.inf)
    logits.masked_fill_(logits.isneginf().all(1, keepdim=True), 0.0)
    logits -= torch.empty_like(logits).exponential_(generator=generator).log_()
    own.fill_(-math.inf)
    return logits.argmax(1)


def _mean_cross_entropy(i2t: Tensor, t2i: Tensor, target: Tensor, smoothing: float) -> Tensor:
    losses = [F.cross_entropy(x, target, label_smoothing=smoothing) for x in (i2t, t2i)]
    return (losses[0] + losses[1]) / 2


def _check(
    image_features: Tensor,
    text_features: Tensor,
    temperature: float | Tensor,
    label_smoothing: float,
) -> None:
    name = "itc_loss"
    wanted = "(batch, queries, features), one query at least"
    check_pairs(name, image_features, text_features, 3, wanted)
    check_number(name, "temperature", temperature, above=0.0)
    if not 0.0 <= label_smoothing <= 1.0:
        raise wrong_value(name, "label_smoothing", label_smoothing, "0 to 1")


def check_pairs(
    name: str, image_features: Tensor, text_features: Tensor, dimensions: int, wanted: str
) -> None:
    """Refuse features that are not of pairs: of one batch, width, floating dtype and device."""
    for argument, value in (("image_features", image_features), ("text_features", text_features)):
        if not isinstance(value, Tensor):
            raise not_a_tensor(name, argument, value)
        if not value.is_floating_point():
            raise wrong_type(name, argument, value, "a floating dtype")
    if image_features.ndim != dimensions or 0 in image_features.shape[1:-1]:
        raise wrong_value(name, "image_features", image_features, wanted)
    pairs = (image_features.shape[0], image_features.shape[-1])
    if text_features.shape != pairs:
        raise wrong_value(name, "text_features", text_features, f"{pairs}, a text for each image")
    if text_features.dtype != image_features.dtype:
        wanted = f"{image_features.dtype} as image_features has"
        raise wrong_type(name, "text_features", text_features, wanted)
    if text_features.device != image_features.device:
        wanted = f"{image_features.device}, where image_features is"
        raise wrong_value(name, "text_features", text_features, wanted)


def check_number(name: str, argument: str, value: float | Tensor, *, above: float) -> None:
    """Refuse what is no finite number above ``above``; a tensor on a GPU is not looked at."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise wrong_value(name, argument, value, "a floating tensor of one element")
        number = float(value.detach()) if value.device.type == "cpu" else None
    else:
        number = float(value)
    if number is not None and not above < number < math.inf:
        wanted = "a finite number" if above == -math.inf else "a positive number"
        raise wrong_value(name, argument, number, wanted)
