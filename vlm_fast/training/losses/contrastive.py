"""Image-text contrastive loss over the batches of all ranks, and sampling of hard negatives."""

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
    """The result of `itc_loss`.

    Attributes:
        loss: scalar.
        similarity_i2t: ``(batch, ranks * batch)`` logits of this rank's images against all texts.
        similarity_t2i: ``(batch, ranks * batch)`` logits of this rank's texts against all images.
    """

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
    """Image-text contrastive loss of BLIP-2 (arXiv 2301.12597, section 3.2).

    The similarity of an image and a text is the largest over the image's queries
    (`ops.max_similarity`), divided by the temperature. The loss is the mean of two cross entropies,
    of images among all texts and of texts among all images, whose target is the matching pair.

    In a process group each rank compares its images with the texts of all ranks. Of the images only
    similarities are sent: ``ranks * batch ** 2`` numbers instead of ``queries * features`` per
    image. Gradients flow across ranks, so that the gradient that data parallelism averages is the
    gradient of one process with the whole batch. With one rank no collective is called.

    Args:
        image_features: ``(batch, queries, features)``, normalised over the last dimension.
        text_features: ``(batch, features)``, normalised.
        temperature: a positive number, or a floating tensor with one element, such as a learnable
            parameter. The value of a tensor on a GPU is not checked, because reading it would wait
            for the device.
        label_smoothing: from 0 to 1; LAVIS trains with 0.1.
        local_loss: if True, the loss of each rank is the one of its own rows. If False, it is the
            loss of all rows, so that every rank reports the same number. Averaged gradients are the
            same.
        check_sizes: gather sizes and dtypes first and raise on every rank if they differ. Without
            this check, ranks that differ wait forever or misread bytes. It is a small collective
            that the host reads; switch it off if all batches and dtypes are known to be equal.
        group: the process group; None is the default one.

    Returns:
        The loss and the logits, float32 or wider, differentiable.

    Raises:
        TypeError: a feature is not a floating tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, the temperature is not positive, or the smoothing
            is out of range; on every rank, if ranks differ in sizes or dtypes.
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
        # The rows of the transposed matrix are columns of other ranks: receive one block from each.
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
    """Sample one negative for each row with the probabilities ``softmax(similarity)``.

    The matching pair is never drawn. If all other logits of a row are -inf, they are equally
    likely. The sample is the largest logit after Gumbel noise, which has the distribution of
    ``torch.multinomial`` but needs no normalisation and no read by the host.

    Args:
        similarity: ``(batch, ranks * batch)`` logits: ``similarity_i2t`` of `ContrastiveOutput`
            draws texts, ``similarity_t2i`` draws images.
        rank_offset: the column of the first row's matching pair, rank * batch.
        generator: on the device of ``similarity``.

    Returns:
        ``(batch,)`` int64, column numbers.

    Raises:
        TypeError: ``similarity`` is not a floating tensor.
        ValueError: it is not ``(batch, columns)``, the matching pairs are out of range, or there is
            only one column, so that there is no negative.
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
    """Check image and text features: equal batch, width, floating dtype and device.

    Args:
        name: of the public function that checks, for the message.
        dimensions: of ``image_features``.
        wanted: the shape of ``image_features`` in words.

    Raises:
        TypeError: a feature is not a floating tensor, or dtypes differ.
        ValueError: shapes or devices do not fit.
    """
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
    """Check that ``value`` is one finite number greater than ``above``.

    The value of a tensor on a GPU is not read, because that would wait for the device.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise wrong_value(name, argument, value, "a floating tensor of one element")
        number = float(value.detach()) if value.device.type == "cpu" else None
    else:
        number = float(value)
    if number is not None and not above < number < math.inf:
        wanted = "a finite number" if above == -math.inf else "a positive number"
        raise wrong_value(name, argument, number, wanted)
