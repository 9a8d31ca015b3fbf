"""The image-text similarity of BLIP-2: the maximum over an image's query outputs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels._launcher import is_traced
from vlm_fast.ops.declaration import Cost, linear_op, nbytes, no_kernel_for

# The number of scores of (images, queries, texts) that are computed at a time. A tile fits into the
# second-level cache; on a GPU it is also large enough to fill the tensor cores.
TILE = {"cpu": 2**18, "cuda": 2**22}


# With this many queries or more, sums over the winning pairs are faster on a CPU than GEMMs of
# mostly zeros.
SPARSE = 16


@linear_op(
    images="floating (image_count, queries, features)",
    texts="like images (text_count, features)",
    where={"queries > 0": "images: (images, queries, features) with at least one query"},
)
def max_similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Image-text similarity of BLIP-2: ``out[a, c]`` is the maximum of ``images[a] @ texts[c]``.

    BLIP-2, arXiv 2301.12597, section 3.2: the query output of an image that is most similar to the
    text counts. Scores are computed in tiles and are never all in memory. Backward keeps the index
    of the winning query, one byte a pair (two above 256 queries, four above 32768). Among equal
    scores the first is taken, as in ``torch.max``. Dtypes other than fp32, fp16 and bf16 fall back.

    Returns:
        ``(image_count, text_count)``, in the dtype of ``images`` or autocast's.
    """
    return torch.matmul(images, texts.t()).max(dim=1).values


@max_similarity.fallback_reason
def fallback_reason(images: Tensor, texts: Tensor) -> str | None:
    return no_kernel_for(images) or no_kernel_for(texts)


@max_similarity.forward
def forward(
    needs_grad: Any, images: Tensor, texts: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    count, queries, _ = images.shape
    out = images.new_empty(count, texts.shape[0])
    winner = torch.empty_like(out, dtype=_number_dtype(queries)) if any(needs_grad) else None
    if not is_traced(images):
        columns = texts.t()
        for part in _parts(count, queries * texts.shape[0], images):
            # A tile has no name, so that it is freed before the next one is computed.
            if winner is None:
                torch.amax(torch.matmul(images[part], columns), 1, out=out[part])
            else:
                out[part], winner[part] = torch.matmul(images[part], columns).max(1)
    if winner is None:
        return out, (None, None, None, None)
    return out, (
        images if needs_grad.texts else None,
        texts if needs_grad.images else None,
        winner,
        images.new_empty(count, queries, 0) if needs_grad.images else None,  # only the shape
    )


@max_similarity.backward
def backward(needs_grad: Any, saved_tensors: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    images, texts, winner, like = saved_tensors
    count, queries, _ = (images if like is None else like).shape
    traced = is_traced(dy)
    sparse = not (traced or dy.is_cuda) and queries >= SPARSE and dy.numel() > 0
    if sparse and all(operand is None or _is_finite(operand) for operand in (images, texts)):
        return _sum_winners(dy, winner, images, texts, queries)
    dimages = dy.new_empty(count, queries, texts.shape[1]) if needs_grad.images else None
    dtexts = dy.new_empty(winner.shape[1], images.shape[2]) if needs_grad.texts else None
    if traced:
        return dimages, dtexts
    # Each gradient is computed in parts of its own rows, so that no sum is split and rounded twice.
    per_image, per_text = queries * winner.shape[1], queries * count
    tile = None
    if dimages is not None:
        for part in _parts(count, per_image, dy):
            tile = _spread(dy[part], winner[part], queries)
            torch.mm(tile.flatten(0, 1), texts, out=dimages[part].flatten(0, 1))
    if dtexts is not None:
        rows = images.flatten(0, 1)
        if tile is not None and len(tile) == count:  # one tile holds all pairs, for both gradients
            return dimages, torch.mm(tile.flatten(0, 1).t(), rows, out=dtexts)
        for part in _parts(winner.shape[1], per_text, dy):
            tile = _spread(dy[:, part], winner[:, part], queries)
            torch.mm(tile.flatten(0, 1).t(), rows, out=dtexts[part])
    return dimages, dtexts


def _number_dtype(queries: int) -> torch.dtype:
    """The smallest dtype that holds the number of a query."""
    if queries <= 2**8:
        return torch.uint8
    return torch.int16 if queries <= 2**15 else torch.int32


def _parts(rows: int, width: int, like: Tensor) -> list[slice]:
    """Ranges of at least one row each, with at most `TILE` elements if rows have ``width``."""
    step = max(TILE["cuda" if like.is_cuda else "cpu"] // max(width, 1), 1)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _spread(dy: Tensor, winner: Tensor, queries: int) -> Tensor:
    """``(images, queries, texts)``: each gradient at the query that won, zeros elsewhere."""
    tile = dy.new_zeros(dy.shape[0], queries, dy.shape[1])
    return tile.scatter_(1, winner[:, None].long(), dy[:, None])


def _is_finite(operand: Tensor) -> bool:
    """Whether the sum of all elements is finite, which is faster than a test of each element.

    The sum of finite elements may overflow; then the slower but equally correct path is taken.
    """
    return operand.numel() > 0 and math.isfinite(operand.sum().item())


def _sum_winners(
    dy: Tensor, winner: Tensor, images: Tensor | None, texts: Tensor | None, queries: int
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of images and texts as sums over the winning pairs of query and text.

    This is one part in ``queries`` of the work of the GEMMs. It is only for finite operands:
    autograd multiplies infinities by the zeros of other pairs and gives NaN, these sums do not.
    """
    count, width = winner.shape
    dimages = dtexts = None
    if texts is not None:
        won, order = winner.sort(stable=True, dim=1)  # texts sorted by winning query
        numbers = torch.arange(queries, device=dy.device).to(winner.dtype)
        first = torch.searchsorted(won, numbers.repeat(count, 1))
        first += torch.arange(0, count * width, width, device=dy.device)[:, None]
        dimages = F.embedding_bag(
            order.flatten(), texts, first.flatten(), mode="sum",
            per_sample_weights=dy.gather(1, order).flatten(),
        ).view(count, queries, texts.shape[1])  # fmt: skip
    if images is not None:
        rows = winner.t() + torch.arange(0, count * queries, queries, device=dy.device)
        dtexts = F.embedding_bag(
            rows, images.flatten(0, 1), mode="sum",
            per_sample_weights=dy.t().contiguous(),
        )  # fmt: skip
    return dimages, dtexts


@max_similarity.cost
def cost(images: Tensor, texts: Tensor) -> Cost:
    pairs = images.shape[0] * texts.shape[0]
    scores = 2 * pairs * images.shape[1] * images.shape[2]
    numbers = pairs * (1 if images.shape[1] <= 2**8 else 2)
    values = pairs * images.element_size()
    return Cost(
        forward_flops=scores,
        forward_bytes=nbytes(images, texts) + values + numbers,
        backward_flops=4 * pairs * images.shape[2],  # only winning pairs
        backward_bytes=2 * nbytes(images, texts) + values + numbers,
    )


@max_similarity.inputs(
    smallest=dict(shape=(1, 1, 1), texts=1),
    usual=dict(shape=(3, 5, 17), texts=4),
    others=[
        dict(shape=(7, 32, 24), texts=11),
        dict(shape=(40, 33, 8), texts=200),
        dict(shape=(2, 300, 9), texts=5),
    ],
    large=dict(shape=(5, 107_000, 4096), texts=64),
    bench={
        "64 images x 64 texts": dict(shape=(64, 32, 256), texts=64),
        "64 x 512 texts": dict(shape=(64, 32, 256), texts=512),
    },
)
def inputs(shape: tuple[int, ...], texts: int) -> tuple[Tensor, Tensor]:
    features = shape[-1] ** -0.5
    return torch.randn(shape) * features, torch.randn(texts, shape[-1])
