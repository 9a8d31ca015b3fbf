"""Flamingo's gated cross-attention block, with OpenFlamingo's parameter names and arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.parameter_access.activation import activation_name
from vlm_fast.modules.parameter_access.module_tree import why_not_direct_tree
from vlm_fast.modules.parameter_access.module_view import view_of
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value

OP = "GatedCrossAttentionBlock"


@dataclass(frozen=True)
class MediaKeyValues:
    """Keys and values of media for one block, made by `GatedCrossAttentionBlock.key_values`.

    Attributes:
        k, v: ``(batch, heads, media * tokens_per_media, d)``.
        tokens_per_media: number of latents of each medium.
    """

    k: Tensor
    v: Tensor
    tokens_per_media: int


class MaskedCrossAttention(nn.Module):
    """The cross-attention of a `GatedCrossAttentionBlock`, with OpenFlamingo's parameter names.

    Arguments are those of the block.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int,
        dim_head: int = 64,
        heads: int = 8,
        only_attend_immediate_media: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale = dim_head**-0.5
        self.heads = heads
        inner = dim_head * heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **factory)
        self.to_q = nn.Linear(dim, inner, bias=False, **factory)
        self.to_kv = nn.Linear(dim_visual, inner * 2, bias=False, **factory)
        self.to_out = nn.Linear(inner, dim, bias=False, **factory)
        self.only_attend_immediate_media = only_attend_immediate_media

    def forward(
        self,
        x: Tensor,
        media: Tensor | MediaKeyValues,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
    ) -> Tensor:
        """The attention output ``(batch, tokens, dim)``, before the gate and the residual.

        Arguments and errors are those of `GatedCrossAttentionBlock.forward`.
        """
        return attend(self, x, media, media_locations, use_cached_media)


class GatedCrossAttentionBlock(nn.Module):
    """``h = x + tanh(attn_gate) * attn(x, media)``, then ``h + tanh(ff_gate) * ff(h)``.

    Mirrors OpenFlamingo's class of this name (Flamingo, arXiv 2204.14198, section 3.1.2), with its
    arguments and parameter names. No mask or score matrix of text by all latents is formed. To use
    the same media in several calls, as during generation, project them once by `key_values`.

    Args:
        dim: width of the text.
        dim_visual: width of the media's latents.
        dim_head: width of a head; above 128 the op runs as plain PyTorch.
        heads: number of heads.
        ff_mult: width of the feed-forward network in multiples of ``dim``.
        only_attend_immediate_media: a token attends only to the last medium before it, and to
            nothing before the first medium. Otherwise it attends to all previous media, and before
            the first one its attention output is the mean of all values.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        only_attend_immediate_media: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attn = MaskedCrossAttention(
            dim=dim, dim_visual=dim_visual, dim_head=dim_head, heads=heads,
            only_attend_immediate_media=only_attend_immediate_media, **factory,
        )  # fmt: skip
        self.attn_gate = nn.Parameter(torch.zeros(1, **factory))
        self.ff = nn.Sequential(
            nn.LayerNorm(dim, **factory),
            nn.Linear(dim, dim * ff_mult, bias=False, **factory),
            nn.GELU(),
            nn.Linear(dim * ff_mult, dim, bias=False, **factory),
        )
        self.ff_gate = nn.Parameter(torch.zeros(1, **factory))

    def key_values(self, media: Tensor) -> MediaKeyValues:
        """Project ``media (batch, media, latents, dim_visual)`` for several calls of `forward`.

        Raises:
            TypeError: media is not a tensor.
            ValueError: media has another shape.
        """
        return project(self.attn, media)

    def forward(
        self,
        x: Tensor,
        media: Tensor | MediaKeyValues,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
    ) -> Tensor:
        """Text ``x (batch, tokens, dim)`` to the same shape.

        Args:
            x: the text.
            media: ``(batch, media, latents, dim_visual)``, or the result of `key_values`.
            media_locations: bool ``(batch, tokens)``, true at the token of each medium. None: every
                token attends to all media.
            use_cached_media: all media tokens come before x; ``media_locations`` then describes
                that earlier text and may have any length.

        Raises:
            TypeError: an argument has a wrong type or dtype.
            ValueError: shapes do not fit, or the text has more media tokens than there are media
                (on CUDA checked on the device, see `vlm_fast.ops.media_cross_attention`).
        """
        reason = why_not_fused(self)
        return gated_block(self, x, media, media_locations, use_cached_media, reason)


def why_not_fused(block: Any) -> str | None:
    """Why the children of a block must be called as modules, or None."""
    return why_not_direct_tree(block, biases=False)


def gated_block(
    block: Any, x: Tensor, media: Any, media_locations: Tensor | None, use_cached_media: bool,
    reason: str | None,
) -> Tensor:  # fmt: skip
    """The forward of a module with the children of a `GatedCrossAttentionBlock`; see there.

    ``reason``: that of `why_not_fused`.
    """
    if reason is not None:
        record_fallback(type(block).__name__, reason)
        attended = block.attn(x, media, media_locations, use_cached_media)
        x = ops.gated_add(x, attended.to(x.dtype), block.attn_gate)
        return ops.gated_add(x, block.ff(x).to(x.dtype), block.ff_gate)
    norm, linear_1, act, linear_2 = view_of(block).ff
    attended = attend(block.attn, x, media, media_locations, use_cached_media)
    x, normed = ops.gated_add_norm(
        x, attended.to(x.dtype), block.attn_gate, norm.weight, norm.bias, eps=norm.eps
    )
    expanded = ops.mlp(
        normed, linear_1.weight, linear_1.bias, linear_2.weight, linear_2.bias,
        activation=cast(str, activation_name(act)),
    )  # fmt: skip
    return ops.gated_add(x, expanded.to(x.dtype), block.ff_gate)


def attend(
    attn: Any, x: Tensor, media: Any, media_locations: Tensor | None, use_cached_media: bool
) -> Tensor:
    """The forward of any module with the children of a `MaskedCrossAttention`, which are called."""
    if not isinstance(x, Tensor):
        raise not_a_tensor(OP, "x", x)
    if x.ndim != 3 or x.shape[2] != getattr(attn.to_q, "in_features", x.shape[2]):
        raise wrong_value(OP, "x", x, f"(batch, tokens, {attn.to_q.in_features})")
    found = media if isinstance(media, MediaKeyValues) else project(attn, media)
    if found.k.shape[0] != x.shape[0]:
        raise wrong_value(OP, "media", found.k, f"{x.shape[0]} samples, as x has")
    q = attn.to_q(attn.norm(x)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
    count = found.k.shape[2] // max(1, found.tokens_per_media)
    immediate = bool(attn.only_attend_immediate_media)
    attended = ops.media_cross_attention(
        q, found.k, found.v, media_index(x, count, media_locations, use_cached_media),
        tokens_per_media=found.tokens_per_media, scale=attn.scale,
        attend="latest" if immediate and media_locations is not None else "all_previous",
        unattended="zero" if immediate else "uniform",
    )  # fmt: skip
    return attn.to_out(attended.transpose(1, 2).flatten(2))


def media_index(
    x: Tensor, media: int, media_locations: Tensor | None, use_cached_media: bool
) -> Tensor:
    """The number of media up to and including each token, int64 ``(batch, tokens)``."""
    batch, tokens = x.shape[:2]
    if media_locations is None:
        return torch.full((batch, tokens), media, dtype=torch.int64, device=x.device)
    if not isinstance(media_locations, Tensor):
        raise not_a_tensor(OP, "media_locations", media_locations)
    if media_locations.dtype != torch.bool:
        raise wrong_type(OP, "media_locations", media_locations, "torch.bool")
    length = media_locations.shape[-1] if use_cached_media else tokens
    if media_locations.shape != (batch, length):
        wanted = f"({batch}, {'any length' if use_cached_media else tokens})"
        raise wrong_value(OP, "media_locations", media_locations, wanted)
    if use_cached_media:
        return media_locations.sum(1, keepdim=True).expand(batch, tokens)
    return media_locations.cumsum(1)


def project(attn: Any, media: Any) -> MediaKeyValues:
    """Project ``media (batch, media, latents, dim_visual)`` to keys and values."""
    if not isinstance(media, Tensor):
        raise not_a_tensor(OP, "media", media)
    width = getattr(attn.to_kv, "in_features", media.shape[-1])
    if media.ndim != 4 or media.shape[3] != width:
        raise wrong_value(OP, "media", media, f"(batch, media, latents, {width})")
    kv = attn.to_kv(media.flatten(1, 2)).unflatten(2, (2, attn.heads, -1))
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    return MediaKeyValues(k, v, media.shape[2])
