"""The similarity of BLIP-2: a text against that query of an image that is nearest to it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels._launcher import is_traced
from vlm_fast.ops.declaration import Cost, linear_op, nbytes, no_kernel_for

# Elements of a tile of (images, queries, texts): on a CPU it stays in the second-level cache, on a
# GPU in the second-level cache too, but is large enough to fill the tensor cores.
TILE = {"cpu": 2**18, "cuda": 2**22}


# On a CPU, from how many queries on sums over winners beat GEMMs full of zeros.
SPARSE = 16


@linear_op(
    images="floating (image_count, queries, features)",
    texts="like images (text_count, features)",
    where={"queries > 0": "images: (images, queries, features) with at least one query"},
)
def max_similarity(images: Tensor, texts: Tensor) -> Tensor:
    """The image-text similarity of BLIP-2: ``out[a, c] = max over q of <images[a, q], texts[c]>``.

    BLIP-2, arXiv 2301.12597, section 3.2: of all query outputs of an image, the one nearest to the
    text counts. Beyond a tile, the scores of all queries are never in memory. Backward keeps the
    index of the winning query, one byte a pair (two above 256 queries, four above 32768). Among
    equal scores the first wins, as in ``torch.max``. Dtypes other than fp32, fp16 and bf16 fall
    back.

    Returns:
        ``(image_count, text_count)``, in the dtype of ``images`` or autocast's.
    """
    return torch.matmul(images, texts.t()).max(dim=1).values


@max_similarity.fallback_reason
def fallback_reason(images, texts):
    return no_kernel_for(images) or no_kernel_for(texts)


@max_similarity.forward
def forward(needs_grad, images, texts):
    count, queries, _ = images.shape
    out = images.new_empty(count, texts.shape[0])
    winner = torch.empty_like(out, dtype=_number_dtype(queries)) if any(needs_grad) else None
    if not is_traced(images):
        columns = texts.t()
        for part in _parts(count, queries * texts.shape[0], images):
            # The tile has no name: it is gone before the next is made.
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
        images.new_empty(count, queries, 0) if needs_grad.images else None,  # the shape alone
    )


@max_similarity.backward
def backward(needs_grad, saved_tensors, dy):
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
    # Each gradient is split along its own rows: no sum is cut into parts, so none is rounded twice.
    per_image, per_text = queries * winner.shape[1], queries * count
    tile = None
    if dimages is not None:
        for part in _parts(count, per_image, dy):
            tile = _spread(dy[part], winner[part], queries)
            torch.mm(tile.flatten(0, 1), texts, out=dimages[part].flatten(0, 1))
    if dtexts is not None:
        rows = images.flatten(0, 1)
        if tile is not None and len(tile) == count:  # the whole, which serves both
            return dimages, torch.mm(tile.flatten(0, 1).t(), rows, out=dtexts)
        for part in _parts(winner.shape[1], per_text, dy):
            tile = _spread(dy[:, part], winner[:, part], queries)
            torch.mm(tile.flatten(0, 1).t(), rows, out=dtexts[part])
    return dimages, dtexts


def _number_dtype(queries: int) -> torch.dtype:
    if queries <= 2**8:
        return torch.uint8
    return torch.int16 if queries <= 2**15 else torch.int32


def _parts(rows: int, width: int, like: Tensor) -> list[slice]:
    """Ranges of rows whose tiles keep to the limit; at least a row each."""
    step = max(TILE["cuda" if like.is_cuda else "cpu"] // max(width, 1), 1)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _spread(dy: Tensor, winner: Tensor, queries: int) -> Tensor:
    """``(images, queries, texts)``: each gradient at the query that won, zeros elsewhere."""
    tile = dy.new_zeros(dy.shape[0], queries, dy.shape[1])
    return tile.scatter_(1, winner[:, None].long(), dy[:, None])


def _is_finite(operand: Tensor) -> bool:
    # A sum is read faster than each element; one that overflows is served by the GEMMs too.
    return operand.numel() > 0 and math.isfinite(operand.sum().item())


def _sum_winners(
    dy: Tensor, winner: Tensor, images: Tensor | None, texts: Tensor | None, queries: int
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients from the pairs (query, text) that won alone: one in ``queries`` of the GEMMs.

    These multiply infinities by zeros where a query did not win, as autograd does, and give NaN;
    sums of winners would not. So they are for finite operands.
    """
    count, width = winner.shape
    dimages = dtexts = None
    if texts is not None:
        won, order = winner.sort(stable=True, dim=1)  # the texts of each query side by side
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
def cost(images, texts):
    pairs = images.shape[0] * texts.shape[0]
    scores = 2 * pairs * images.shape[1] * images.shape[2]
    numbers = pairs * (1 if images.shape[1] <= 2**8 else 2)
    values = pairs * images.element_size()
    return Cost(
        forward_flops=scores,
        forward_bytes=nbytes(images, texts) + values + numbers,
        backward_flops=4 * pairs * images.shape[2],  # to the winners alone
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
def inputs(shape, texts):
    features = shape[-1] ** -0.5
    return torch.randn(shape) * features, torch.randn(texts, shape[-1])
