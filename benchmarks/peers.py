"""What others offer for an op: attention of PyTorch, by backend and by mask, and of xformers."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vlm_fast.kernels._media_sight import media_seen

Function = Callable[..., Any]
BACKENDS = {
    "SDPA (flash)": SDPBackend.FLASH_ATTENTION,
    "SDPA (cuDNN)": SDPBackend.CUDNN_ATTENTION,
    "SDPA (efficient)": SDPBackend.EFFICIENT_ATTENTION,
}


def of(name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Function]:
    """The peers of the op ``name`` that can serve these arguments, forward and backward."""
    if name == "media_cross_attention":
        peers = _of_media(*args, **options)
        return {label: f for label, f in peers.items() if _serves(f, args, options)}
    if name != "cross_attention" or any(a is not None for a in args[3:7]) or options.get("dropout"):
        return {}
    found: dict[str, Function] = {label: _sdpa(backend) for label, backend in BACKENDS.items()}
    if importlib.util.find_spec("xformers") is not None:
        found["xformers"] = _xformers
    return {label: f for label, f in found.items() if _serves(f, args, options)}


def _of_media(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, q_norm: Tensor | None = None, *,
    tokens_per_media: int, attend: str = "latest", unattended: str = "zero",
    scale: float | None = None, eps: float = 1e-6,
) -> dict[str, Function]:  # fmt: skip
    """SDPA with a mask of text by keys, and FlexAttention; what makes their masks is not timed.

    Where queries are normed, ATen does it before.
    """
    seen = media_seen(index, k.shape[2] // tokens_per_media, attend)
    if unattended != "zero":
        seen = seen | ~seen.any(-1, keepdim=True)
    mask = seen.repeat_interleave(tokens_per_media, 2).unsqueeze(1)
    grouped = q.shape[1] != k.shape[1]

    def normed(q: Tensor) -> Tensor:
        return q if q_norm is None else F.rms_norm(q, q.shape[-1:], q_norm, eps)

    def dense(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        q = normed(q)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)

    found: dict[str, Function] = {"SDPA (dense mask)": dense}
    if q.is_cuda:

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return seen[b, query, key // tokens_per_media]

        blocks = create_block_mask(sees, q.shape[0], None, q.shape[2], k.shape[2], str(q.device))
        flex = torch.compile(flex_attention)
        found["FlexAttention"] = lambda q, k, v, *_, **__: flex(
            normed(q), k, v, block_mask=blocks, scale=scale, enable_gqa=grouped
        )
    return found


def _serves(function: Function, args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    leaves = [a.detach().requires_grad_() for a in args[:3]]
    try:
        out = function(*leaves, *args[3:], **options)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    except (RuntimeError, NotImplementedError, ValueError, ImportError):  # no kernel for these
        return False
    return True


def _sdpa(backend: SDPBackend) -> Function:
    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float | None = None) -> Tensor:
        with sdpa_kernel([backend]):
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)

    return attend


def _xformers(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float | None = None) -> Tensor:
    xformers: Any = importlib.import_module("xformers.ops")
    if q.shape[1] != k.shape[1]:
        raise ValueError("xformers takes grouped heads in another layout")
    by_tokens = (t.transpose(1, 2) for t in (q, k, v))
    out: Tensor = xformers.memory_efficient_attention(*by_tokens, scale=scale)
    return out.transpose(1, 2)
