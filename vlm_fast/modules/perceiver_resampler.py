"""Flamingo's Perceiver resampler, with OpenFlamingo's parameter names and arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.fallback import record_fallback
from vlm_fast.modules.parameter_access.module_tree import derived, why_not_direct_tree
from vlm_fast.modules.perceiver_layer import OP, Layer, attend, directly, fused_sequence, resample
from vlm_fast.ops.argument_errors import check_tensor, not_a_tensor, wrong_value


class PerceiverAttention(nn.Module):
    """The attention of a `PerceiverResampler`, with OpenFlamingo's parameter names.

    Args:
        dim: width of features and latents.
        dim_head, heads: width and number of the heads.
        factory: device and dtype.
    """

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
        """The attention output ``(batch, ..., n, dim)``, before the residual.

        Args:
            x: the context, ``(batch, ..., keys, dim)``.
            latents: ``(batch, ..., n, dim)``.

        Raises:
            TypeError: x is not a tensor.
        """
        check_tensor("PerceiverAttention", "x", x)
        context, own = x.flatten(0, -3), latents.flatten(0, -3)
        layer = layer_of_openflamingo(self, nn.Identity())
        found = attend(layer, own, context, None)
        return layer.out(found).view(latents.shape)


class PerceiverResampler(nn.Module):
    """Learned latents attend to any number of vision features: ``num_latents`` tokens per medium.

    Mirrors OpenFlamingo's class of this name (Flamingo, arXiv 2204.14198, section 3.1.1; Perceiver,
    arXiv 2103.03206), with its arguments and parameter names.

    Args:
        dim: width of features and latents.
        depth: number of layers.
        dim_head: width of a head; above 128 the op runs as plain PyTorch.
        heads: number of heads.
        num_latents: number of output tokens per medium.
        max_num_media, max_num_frames: number of position embeddings for media and for the frames of
            a medium; None for no embeddings.
        ff_mult: width of the feed-forward network in multiples of ``dim``.
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
        """``(batch, media, frames, features, dim)`` to ``(batch, media, num_latents, dim)``.

        Raises:
            TypeError: x is not a tensor.
            ValueError: x has another number of dimensions or width, or more media or frames than
                there are embeddings.
        """
        return resample_media(self, x, why_not_direct_tree(self, biases=False))


def resample_media(module: Any, x: Any, reason: str | None) -> Tensor:
    """As `PerceiverResampler.forward`. ``reason``: why the layers of the module are called."""
    _check(module, x)
    batch, media, frames = x.shape[:3]
    if module.frame_embs is not None:
        x = x + module.frame_embs[:frames].unsqueeze(1)
    x = x.flatten(2, 3)
    if module.media_time_embs is not None:
        x = x + module.media_time_embs[:media]
    context = x.flatten(0, 1)
    if reason is None:
        latents = resample(context, module.latents, derived(module, _layers_of))
    else:
        record_fallback(type(module).__name__, reason)
        latents = module.latents.expand(context.shape[0], -1, -1).unsqueeze(1)
        for attention, ff in module.layers:
            latents = attention(context.unsqueeze(1), latents) + latents
            latents = ff(latents) + latents
    # The norm comes last: a unit of FSDP2 must not return a view.
    return module.norm(latents.reshape(batch, media, *module.latents.shape))


def _layers_of(module: Any) -> list[Layer]:
    return [directly(layer_of_openflamingo(attention, ff)) for attention, ff in module.layers]


def layer_of_openflamingo(attention: Any, ff: Any) -> Layer:
    """The `Layer` of OpenFlamingo's attention and feed-forward modules."""
    return Layer(
        attention.norm_media, attention.norm_latents, attention.to_q, (attention.to_kv,),
        attention.to_out, attention.heads, attention.heads, attention.scale, _of_sequence(ff),
    )  # fmt: skip


def _of_sequence(ff: Any) -> Callable[[Tensor], Tensor]:
    return fused_sequence(*ff) if isinstance(ff, nn.Sequential) else ff


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
