"""Masked cross-attention of text to images, as in Flamingo, IDEFICS and Llama 3.2 Vision."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_fast.fallback import switches
from vlm_fast.kernels._launcher import is_traced
from vlm_fast.kernels._media_attention_tilings import kept_bytes
from vlm_fast.kernels._media_mask import media_seen
from vlm_fast.kernels.media_cross_attention import media_attention_backward, media_attention_forward
from vlm_fast.ops.cross_attention import MAX_HEAD_SIZE, safe_softmax, score_scale
from vlm_fast.ops.declaration import Cost, linear_op, nbytes, no_kernel_for

ATTEND = ("latest", "all_previous", "listed")
UNATTENDED = ("zero", "uniform", "everything")
MAX_LISTED = 63  # bits of an int64 without its sign


@linear_op(
    q="floating (batch, heads, queries, d)",
    k="like q (batch, kv_heads, keys, d)",
    v="like q (batch, kv_heads, keys, d)",
    media_index="int64 (batch, queries)",
    q_norm="like q or float32 (d) or None",
    tokens_per_media="int from 1",
    attend=ATTEND,
    unattended=UNATTENDED,
    where={
        "heads % kv_heads == 0 if kv_heads else heads == 0": (
            "k: a number of heads that divides the {heads} heads of q"
        ),
        "keys % tokens_per_media == 0": (
            "k: keys that are a multiple of {tokens_per_media}, tokens_per_media"
        ),
        f"attend != 'listed' or keys // tokens_per_media <= {MAX_LISTED}": (
            f"k: at most {MAX_LISTED} media, the bits of an index"
        ),
    },
)
def media_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    media_index: Tensor,
    q_norm: Tensor | None = None,
    *,
    tokens_per_media: int,
    attend: str = "latest",
    unattended: str = "zero",
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Attention of text tokens to the media that they may see: ``softmax(scale q k^T) v``.

    Mirrors the masked cross-attention of OpenFlamingo (Flamingo, arXiv 2204.14198, section 3.1.3)
    and, over tiles, transformers' ``MllamaTextCrossAttention`` and the cross-attention of
    ``IdeficsAttention``. Work and memory grow with the media that are seen: no mask and no scores
    of all text tokens by all keys are formed. Strides are arbitrary; a last stride other than 1
    costs a copy. Dtypes other than fp32, fp16 and bf16, and d above 128, fall back.

    Args:
        k: ``keys`` is ``media * tokens_per_media``, in the order of the media. Consecutive heads
            of q share a head of k and v (arXiv 2305.13245).
        media_index: For "latest" and "all_previous" the number of media up to this token, as
            ``(input_ids == image_token).cumsum(1)``. For "listed" a set of media: bit m stands for
            medium m, of at most 63.
        q_norm: The weight of an RMSNorm (arXiv 1910.07467) of each query's head, in Llama's form.
            Keys are expected to be normed already.
        tokens_per_media: Keys of one medium.
        attend: The media that a token sees. "latest": the last one up to the token (Flamingo).
            "all_previous": all up to the token. "listed": those in its set.
        unattended: The result of a token that sees no media. "zero"; "uniform": the mean of all
            values (OpenFlamingo with ``only_attend_immediate_media=False``, IDEFICS);
            "everything": attention to all media (Llama 3.2).
        scale: Factor of the scores, ``d ** -0.5`` by default.
        eps: Added to the mean square of a query.

    Returns:
        ``(batch, heads, queries, d)``, in memory ``(batch, queries, heads, d)``.

    Raises:
        ValueError: Also if an index names media that do not exist. On CUDA indices are checked on
            the device without a synchronisation (a device-side assertion), and on the host only
            under `vlm_fast.strict`; media that do not exist are never read.
    """
    batch, heads, queries, d = q.shape
    kv_heads, keys = k.shape[1:3]
    if q_norm is not None:
        wide = q.to(torch.promote_types(q.dtype, torch.float32))
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        q = (unit.to(q.dtype) * q_norm).to(q.dtype)
    group = (batch, kv_heads, heads // max(kv_heads, 1) * queries)  # heads that share keys
    seen = media_seen(media_index, keys // tokens_per_media, attend)
    sees_none = ~seen.any(-1, keepdim=True)
    if unattended != "zero":
        seen = seen | sees_none
    if unattended == "uniform":
        q = q.masked_fill(sees_none[:, None], 0)

    def scores_of(medium: int, k: Tensor) -> Tensor:
        # Queries that do not see this medium are zeroed, so that not even NaN reaches its keys.
        seeing = q.masked_fill(~seen[:, None, :, medium, None], 0).reshape(*group, d)
        return torch.matmul(seeing, k.transpose(2, 3)) * score_scale(scale, d)

    every = [scores_of(m, part) for m, part in enumerate(k.split(tokens_per_media, 2))]
    scores = torch.cat(every, -1).view(batch, heads, queries, keys)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    hidden = ~seen.repeat_interleave(tokens_per_media, -1)[:, None]
    p = safe_softmax(scores.masked_fill(hidden, -torch.inf))
    p = p.masked_fill(hidden, 0).to(q.dtype)
    o = torch.matmul(p.view(*group, keys), v)
    return o.view(*q.shape).transpose(1, 2).contiguous().transpose(1, 2)


@media_cross_attention.fallback_reason
def fallback_reason(
    q, k, v, media_index, q_norm, *, tokens_per_media, attend, unattended, scale, eps
):
    if not 1 <= q.shape[3] <= MAX_HEAD_SIZE:
        return f"head size {q.shape[3]} is not 1 to {MAX_HEAD_SIZE}"
    return no_kernel_for(q)


@media_cross_attention.forward
def forward(
    needs_grad, q, k, v, media_index, q_norm, *, tokens_per_media, attend, unattended, scale, eps
):  # fmt: skip
    _check_index(media_index, k.shape[2] // tokens_per_media, attend)
    o, kept = media_attention_forward(
        q, k, v, media_index, q_norm, tokens_per_media=tokens_per_media, attend=attend,
        unattended=unattended, scale=score_scale(scale, q.shape[3]), eps=eps, keep=any(needs_grad),
    )  # fmt: skip
    return o, (q, k, v, media_index, q_norm, *kept) if any(needs_grad) else ()


@media_cross_attention.backward
def backward(needs_grad, saved_tensors, do, *, tokens_per_media, attend, unattended, scale, eps):
    q, k, v, media_index, q_norm, *kept = saved_tensors
    dq, dk, dv, dq_norm = media_attention_backward(
        do, q, k, v, media_index, q_norm, tokens_per_media=tokens_per_media, attend=attend,
        unattended=unattended, scale=score_scale(scale, q.shape[3]), eps=eps,
        want_q=needs_grad.q or needs_grad.q_norm, want_kv=needs_grad.k or needs_grad.v,
        kept=tuple(kept),
    )  # fmt: skip
    gradients = (dq, dk, dv, None, dq_norm)
    return tuple(g if need else None for g, need in zip(gradients, needs_grad, strict=True))


def _check_index(index: Tensor, media: int, attend: str) -> None:
    """Check that indices name existing media.

    On the host if that costs no synchronisation or under `vlm_fast.strict`; otherwise with an
    assertion on the device.
    """
    if is_traced(index) or not index.numel():
        return
    wrong = (index >> media) != 0 if attend == "listed" else (index < 0) | (index > media)
    if index.is_cuda and not switches.strict:
        message = f"vlm_fast.media_cross_attention: media_index names more than {media} media"
        torch._assert_async(~wrong.any(), message)
        return
    if wrong.any():
        sample, token = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"vlm_fast.media_cross_attention: media_index[{sample}, {token}] is "
            f"{int(index[sample, token])}, expected "
            + (f"no bit beyond the {media} media" if attend == "listed" else f"0 to {media} media")
        )


@media_cross_attention.cost
def cost(q, k, v, media_index, q_norm, *, tokens_per_media, attend, unattended, scale, eps):
    # The number of media that a token is assumed to see: one, half of them, or all.
    media = k.shape[2] // tokens_per_media
    seen = {"latest": min(1, media), "all_previous": (media + 1) / 2, "listed": media}[attend]
    flops = int(4 * q.numel() * tokens_per_media * seen)
    kept = kept_bytes(q, k, q_norm, tokens_per_media, attend, unattended)
    return Cost(
        forward_flops=flops,
        forward_bytes=2 * nbytes(q) + nbytes(k, v) + nbytes(media_index),
        backward_flops=5 * flops // 2,
        backward_bytes=3 * nbytes(q) + kept + 2 * nbytes(k, v) + nbytes(media_index),
    )


_FLAMINGO = dict(batch=8, heads=8, queries=2048, tokens_per_media=64, d=64, before=32)
_LLAMA = dict(
    batch=4, heads=32, kv_heads=8, media=4, keys=6404, tokens_per_media=1601, d=128,
    attend="listed", unattended="everything", sets="all", normed=True,
)  # fmt: skip


@media_cross_attention.inputs(
    smallest=dict(batch=1, heads=1, queries=1, media=1, keys=1, tokens_per_media=1, d=1),
    usual=dict(batch=2, heads=2, queries=19, media=3, keys=27, tokens_per_media=9, d=24, before=3),
    others=[
        dict(
            batch=1, heads=2, kv_heads=1, queries=9, media=3, keys=51, tokens_per_media=17, d=40,
            before=3, attend="all_previous", unattended="uniform",
        ),
        dict(
            batch=1, heads=4, kv_heads=1, queries=5, media=3, keys=57, tokens_per_media=19, d=80,
            before=2, attend="listed", unattended="everything", scale=0.2, normed=True, eps=0.5,
        ),
        dict(
            batch=1, heads=2, kv_heads=1, queries=1, media=2, keys=266, tokens_per_media=133, d=16,
            before=-1, attend="listed", sets="all",
        ),
        dict(batch=2, heads=2, queries=70, media=2, keys=128, tokens_per_media=64, d=64, before=5),
    ],
    large=dict(batch=5, heads=16, queries=140_000, media=16, keys=1024, tokens_per_media=64, d=64),
    bench={
        "OpenFlamingo-9B, 8 x 2048, 1 image": dict(media=1, keys=64, **_FLAMINGO),
        "OpenFlamingo-9B, 8 x 2048, 4 images": dict(media=4, keys=256, **_FLAMINGO),
        "OpenFlamingo-9B, 8 x 2048, 16 images": dict(media=16, keys=1024, **_FLAMINGO),
        "OpenFlamingo-9B, 8 x 2048, 4 images, all previous": dict(
            media=4, keys=256, attend="all_previous", unattended="uniform", **_FLAMINGO
        ),
        "OpenFlamingo-9B, 1 x 2048, 4 images": dict(_FLAMINGO, batch=1, media=4, keys=256),
        "IDEFICS-9B, 4 x 1024, 4 images": dict(
            batch=4, heads=32, queries=1024, media=4, keys=256, tokens_per_media=64, d=128,
            before=16, attend="listed", unattended="uniform", sets="previous",
        ),
        "Llama-3.2-11B-Vision, prefill 4 x 512": dict(queries=512, before=4, **_LLAMA),
        "Llama-3.2-11B-Vision, a step of 4": dict(queries=1, before=-1, **_LLAMA),
    },
)  # fmt: skip
def inputs(
    batch, heads, queries, media, keys, d, *, kv_heads=None, before=0, sets=None, normed=False
):  # fmt: skip
    """Media at even distances after ``before`` tokens of text; -1 puts all of them before the text.

    ``sets`` makes each index a set of bits: of "previous" media, or of "all" media once there is
    one. None makes it the number of previous media.
    """

    def tokens(n, width):
        return torch.randn(batch, n, width, d).transpose(1, 2)

    kv_heads = kv_heads or heads
    sample, token = torch.arange(batch).unsqueeze(1), torch.arange(queries).unsqueeze(0)
    position = token - before - sample if before >= 0 else token * 0 + sample * 0 + queries
    index = (position * media).div(max(1, queries - before), rounding_mode="floor") + 1
    index = index.clamp(0, media)
    if sets == "all":
        index = (index > 0) * (2**media - 1)
    elif sets == "previous":
        index = 2**index - 1
    q, k, v = tokens(queries, heads), tokens(keys, kv_heads), tokens(keys, kv_heads)
    return q, k, v, index, 1 + 0.1 * torch.randn(d) if normed else None
