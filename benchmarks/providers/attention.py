"""Attention of PyTorch (by backend and by mask), xformers and flash-attn."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vlm_fast.benchmarks.providers.peer import Peer, Unavailable
from vlm_fast.kernels._media_mask import media_seen

Function = Callable[..., Any]
BACKENDS = {
    "SDPA": None,  # as PyTorch chooses
    "SDPA (flash)": SDPBackend.FLASH_ATTENTION,
    "SDPA (cuDNN)": SDPBackend.CUDNN_ATTENTION,
    "SDPA (efficient)": SDPBackend.EFFICIENT_ATTENTION,
}
ON_GPUS = ("SDPA (cuDNN)", "SDPA (efficient)")


# ---- cross_attention ----


def plain(*args: Any, dropout: float = 0.0, **options: Any) -> None:
    """Raise `Unavailable` for a second set of keys, a bias, a mask or dropout."""
    if any(a is not None for a in args[3:7]) or dropout:
        raise Unavailable("not the same with a bias, a mask, a second set of keys or dropout")


def sdpa(backend: SDPBackend | None) -> Function:
    def make(*args: Any, **options: Any) -> Function:
        plain(*args, **options)

        def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float | None = None) -> Tensor:
            grouped = q.shape[1] != k.shape[1]
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)

        return attend

    return make


def by_tokens(library: str, function: str, scale_name: str) -> Function:
    """A function of a library whose tensors have tokens before heads."""

    def make(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Function:
        plain(q, k, *rest, **options)
        if library == "xformers.ops" and q.shape[1] != k.shape[1]:
            raise Unavailable("takes grouped heads in another layout")
        theirs = getattr(importlib.import_module(library), function)

        def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float | None = None) -> Tensor:
            out: Tensor = theirs(*(t.transpose(1, 2) for t in (q, k, v)), **{scale_name: scale})
            return out.transpose(1, 2)

        return attend

    return make


# ---- media_cross_attention ----


def queries_normed(q: Tensor, q_norm: Tensor | None, eps: float) -> Tensor:
    return q if q_norm is None else F.rms_norm(q, q.shape[-1:], q_norm, eps)


def dense_mask(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, q_norm: Tensor | None = None, *,
    tokens_per_media: int, attend: str = "latest", unattended: str = "zero",
    scale: float | None = None, eps: float = 1e-6,
) -> Function:  # fmt: skip
    """SDPA with a mask of text by keys; rows that attend to no medium are undefined."""
    seen = media_seen(index, k.shape[2] // tokens_per_media, attend)
    if unattended != "zero":
        seen = seen | ~seen.any(-1, keepdim=True)
    mask = seen.repeat_interleave(tokens_per_media, 2).unsqueeze(1)
    grouped = q.shape[1] != k.shape[1]

    def attend_to(
        q: Tensor, k: Tensor, v: Tensor, index: Tensor, q_norm: Tensor | None = None, **_: Any
    ) -> Tensor:
        q = queries_normed(q, q_norm, eps)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)

    return attend_to


def block_mask(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, q_norm: Tensor | None = None, *,
    tokens_per_media: int, attend: str = "latest", unattended: str = "zero",
    scale: float | None = None, eps: float = 1e-6,
) -> Function:  # fmt: skip
    """Compiled FlexAttention with a block mask."""
    seen = media_seen(index, k.shape[2] // tokens_per_media, attend)
    grouped = q.shape[1] != k.shape[1]

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen[b, query, key // tokens_per_media]

    blocks = create_block_mask(sees, q.shape[0], None, q.shape[2], k.shape[2], str(q.device))
    flex: Any = torch.compile(flex_attention)

    def attend_to(
        q: Tensor, k: Tensor, v: Tensor, index: Tensor, q_norm: Tensor | None = None, **_: Any
    ) -> Tensor:
        q = queries_normed(q, q_norm, eps)
        found: Tensor = flex(q, k, v, block_mask=blocks, scale=scale, enable_gqa=grouped)
        return found

    return attend_to


PEERS = (
    *(
        Peer(name, "cross_attention", sdpa(backend), cuda_only=name in ON_GPUS)
        for name, backend in BACKENDS.items()
    ),
    Peer(
        "xformers",
        "cross_attention",
        by_tokens("xformers.ops", "memory_efficient_attention", "scale"),
        package="xformers",
    ),
    Peer(
        "flash-attn",
        "cross_attention",
        by_tokens("flash_attn", "flash_attn_func", "softmax_scale"),
        package="flash_attn",
        cuda_only=True,
    ),
    Peer("SDPA (dense mask)", "media_cross_attention", dense_mask),
    Peer("FlexAttention", "media_cross_attention", block_mask, cuda_only=True, compiles=True),
)
