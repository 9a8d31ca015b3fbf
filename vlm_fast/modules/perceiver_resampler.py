"""Flamingo's Perceiver resampler, with the keys and arguments of OpenFlamingo.

Latents attend to the context and to themselves: keys and values come in two parts, which are never
concatenated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.fused_sequence import fused_mlp
from vlm_fast.modules.parameter_access.module_tree import why_not_direct_tree
from vlm_fast.ops.argument_errors import check_tensor, not_a_tensor, wrong_value

OP = "PerceiverResampler"
KeysValues = tuple[Tensor, Tensor]


class Layer(NamedTuple):
    """The modules of one layer, whatever they are called."""

    norm_context: Any
    norm_latents: Any
    query: Any
    key_value: tuple[Any, ...]  # one linear of both, or one each
    out: Any
    heads: int
    key_heads: int
    scale: float
    feed_forward: Callable[[Tensor], Tensor]  # with its norm
    head_norms: tuple[Any, Any] | None = None  # of queries and of keys


class PerceiverAttention(nn.Module):
    """The attention of a `PerceiverResampler`, with OpenFlamingo's parameter names."""

    def __init__(self, *, dim: int, dim_head: int = 64, heads: int = 8, **factory: Any) -> None:
        super().__init__()
        inner = dim_head * heads
        self.scale, self.heads = dim_head**-0.5, heads
        self.norm_media = nn.LayerNorm(dim, **factory)
        self.norm_latents = nn.LayerNorm(dim, **factory)
        self.to_q = nn.Linear(dim, inner, bias=False, **factory)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False, **factory)
        self.to_out = nn.Linear(inner, dim, bias=False, **factory)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """What is added to the latents ``(batch, ..., n, dim)``; x: ``(batch, ..., keys, dim)``."""
        check_tensor("PerceiverAttention", "x", x)
        context, own = x.flatten(0, -3), latents.flatten(0, -3)
        layer = layer_of_openflamingo(self, nn.Identity())
        found = _attend(layer, own, context, None)
        return layer.out(found).view(latents.shape)


class PerceiverResampler(nn.Module):
    """Any number of vision features to ``num_latents`` of the same width.

    Mirrors OpenFlamingo's class of this name (Flamingo, arXiv 2204.14198, section 3.1.1; Perceiver,
    arXiv 2103.03206), with its arguments and parameter names.

    Args:
        dim: width of features and latents.
        depth: how many layers.
        dim_head, heads: of the attention; heads of more than 128 fall back.
        num_latents: how many latents come out of each medium.
        max_num_media, max_num_frames: give a position embedding to media and to the frames of each,
            None gives none.
        ff_mult: width of the feed-forward network in multiples of ``dim``.

    Shapes: ``(batch, media, frames, features, dim)`` to ``(batch, media, num_latents, dim)``.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        ff_mult: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, **factory))

        self.latents = drawn(num_latents, dim)
        self.frame_embs = None if max_num_frames is None else drawn(max_num_frames, dim)
        self.media_time_embs = None if max_num_media is None else drawn(max_num_media, 1, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim=dim, dim_head=dim_head, heads=heads, **factory),
                    nn.Sequential(
                        nn.LayerNorm(dim, **factory),
                        nn.Linear(dim, dim * ff_mult, bias=False, **factory),
                        nn.GELU(),
                        nn.Linear(dim * ff_mult, dim, bias=False, **factory),
                    ),
                ]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, media, num_latents, dim)``.

        Raises:
            TypeError, ValueError: x is no tensor, not of this rank and width, or has more media or
                frames than there are embeddings.
        """
        return resample_media(self, x)


def resample_media(module: Any, x: Any) -> Tensor:
    """The forward of any module with the children of `PerceiverResampler`."""
    _check(module, x)
    batch, media, frames = x.shape[:3]
    if module.frame_embs is not None:
        x = x + module.frame_embs[:frames].unsqueeze(1)
    x = x.flatten(2, 3)
    if module.media_time_embs is not None:
        x = x + module.media_time_embs[:media]
    context = x.flatten(0, 1)
    reason = why_not_direct_tree(module, biases=False)
    if reason is None:
        layers = [layer_of_openflamingo(attention, ff) for attention, ff in module.layers]
        latents = resample(context, module.latents, layers)
    else:
        record_fallback(type(module).__name__, reason)
        latents = module.latents.expand(context.shape[0], -1, -1).unsqueeze(1)
        for attention, ff in module.layers:
            latents = attention(context.unsqueeze(1), latents) + latents
            latents = ff(latents) + latents
    # The norm comes last: FSDP2 wants what a unit returns to be no view.
    return module.norm(latents.reshape(batch, media, *module.latents.shape))


def layer_of_openflamingo(attention: Any, ff: Any) -> Layer:
    """A layer of OpenFlamingo's resampler."""
    return Layer(
        attention.norm_media, attention.norm_latents, attention.to_q, (attention.to_kv,),
        attention.to_out, attention.heads, attention.heads, attention.scale, _of_sequence(ff),
    )  # fmt: skip


def _of_sequence(ff: Any) -> Callable[[Tensor], Tensor]:
    return fused_sequence(*ff) if isinstance(ff, nn.Sequential) else ff


def fused_sequence(norm: Any, linear_1: Any, act: Any, linear_2: Any) -> Callable[[Tensor], Tensor]:
    """``linear_2(act(linear_1(norm(x))))`` as a function."""
    return lambda x: fused_mlp(OP, norm(x), linear_1, act, linear_2, "preactivation")


def resample(
    context: Tensor,
    latents: Tensor,
    layers: Sequence[Layer],
    key_mask: Tensor | None = None,
) -> Tensor:
    """``(batch, n, dim)``: latents ``(n, dim)`` after all layers, which read ``context``.

    The parameters of all layers may be read. ``key_mask``: bool ``(batch, keys)``, True where the
    context is seen.
    """
    batch = context.shape[0]
    if key_mask is not None:  # latents see one another
        key_mask = torch.cat((key_mask, key_mask.new_ones(batch, len(latents))), 1)
    own = latents.unsqueeze(0)  # the same for all images until they have seen one
    for layer in layers:
        own = layer.out(_attend(layer, own, context, key_mask)) + own
        own = layer.feed_forward(own) + own
    return own.expand(batch, -1, -1)


def _attend(layer: Layer, latents: Tensor, context: Tensor, key_mask: Tensor | None) -> Tensor:
    """Attention of latents ``(batch or 1, n, dim)`` to the context and themselves.

    The result has its heads side by side.
    """
    batch, normed = context.shape[0], layer.norm_latents(latents)
    q = layer.query(normed).unflatten(2, (layer.heads, -1))
    if layer.head_norms is not None:
        q = layer.head_norms[0](q)
    (k, v), (k2, v2) = _key_values(layer, layer.norm_context(context), normed)
    q, k2, v2 = (t.expand(batch, -1, -1, -1) for t in (q.transpose(1, 2), k2, v2))
    attended = ops.cross_attention(q, k, v, k2, v2, key_mask=key_mask, scale=layer.scale)
    return attended.transpose(1, 2).flatten(2)


def _key_values(layer: Layer, context: Tensor, latents: Tensor) -> list[KeysValues]:
    """Keys and values ``(batch, heads, tokens, d)`` of the context and of the latents, normed.

    Their rows are multiplied at once: of two products with one weight autograd adds the gradients,
    and holds three of them meanwhile.
    """
    rows = torch.cat((context.flatten(0, 1), latents.flatten(0, 1)))
    parts = [linear(rows) for linear in layer.key_value]
    k, v = parts if len(parts) == 2 else parts[0].chunk(2, -1)
    counts = [x.shape[0] * x.shape[1] for x in (context, latents)]
    return [
        _as_heads(layer, *(rows.unflatten(0, x.shape[:2]) for rows in pair))
        for x, *pair in zip((context, latents), k.split(counts), v.split(counts), strict=True)
    ]


def _as_heads(layer: Layer, k: Tensor, v: Tensor) -> KeysValues:
    k, v = (t.unflatten(2, (layer.key_heads, -1)) for t in (k, v))
    if layer.head_norms is not None:
        norm = layer.head_norms[1]
        # A bias moves all scores of a query alike, which a softmax does not see; its gradient is 0,
        # where that of the two parts of the keys would be the rounding of their sum.
        k = F.layer_norm(k, k.shape[-1:], norm.weight, norm.bias * 0, norm.eps)
    return k.transpose(1, 2), v.transpose(1, 2)


def _check(module: Any, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise not_a_tensor(OP, "x", x)
    dim = module.latents.shape[1]
    if x.ndim != 5 or x.shape[4] != dim:
        raise wrong_value(OP, "x", x, f"(batch, media, frames, features, {dim})")
    for name, axis, what in (("media_time_embs", 1, "media"), ("frame_embs", 2, "frames")):
        embeddings = getattr(module, name)
        if embeddings is not None and x.shape[axis] > len(embeddings):
            raise wrong_value(OP, "x", x, f"at most {len(embeddings)} {what}, as {name} has")
