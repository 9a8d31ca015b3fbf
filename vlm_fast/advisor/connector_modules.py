"""The modules of each connector, as they are called, and the numbers of tokens it can produce."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.advisor.model_shapes import ModelShape
from vlm_fast.modules import (
    AnyResPacker,
    GatedCrossAttentionBlock,
    MLPProjector,
    PerceiverResampler,
    PixelShuffleProjector,
    PooledMLPProjector,
    QFormer,
    TokenMerger,
)
from vlm_fast.ops.anyres_tiling import Tiling
from vlm_fast.ops.pixel_shuffle_norm import MAX_FEATURES
from vlm_fast.ops.spatial_pool import MAX_STRIDE

QFORMER_WIDTH = 768
GATED_EVERY = 4  # language model layers per gated block: OpenFlamingo-9B, IDEFICS-9B
ANYRES_TILES = 2  # tiles along a side, in addition to the base tile: 672 pixels of LLaVA-NeXT


@dataclass(frozen=True)
class DesignPoint:
    """A connector at one number of tokens in one model.

    Attributes:
        model: shapes of the vision encoder and the language model.
        connector: its name.
        tokens: per image that the language model sees.
        images: per prompt.
        prompts: at the same time.
        text: text tokens per prompt; only gated cross-attention processes them.
        saved: what the backward of an MLP keeps, see `vlm_fast.ops.mlp`.
    """

    model: ModelShape
    connector: str
    tokens: int
    images: int = 1
    prompts: int = 1
    text: int = 1
    saved: str = "preactivation"


@dataclass(frozen=True)
class ConnectorModule:
    """A module of a connector and its arguments.

    Attributes:
        make: makes the module on the default device.
        inputs: makes its arguments on the default device.
        count: number of such modules in the model.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    count: int = 1


# ---- modules composed of those in `vlm_fast.modules` ----


class QFormerConnector(nn.Module):
    """BLIP-2's query tokens, Q-Former and ``language_projection``, without dropout."""

    def __init__(self, width: int, tokens: int, hidden: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.randn(1, tokens, QFORMER_WIDTH))
        self.qformer = QFormer(encoder_hidden_size=width).eval()
        self.language_projection = nn.Linear(QFORMER_WIDTH, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, patches, width)`` to ``(batch, tokens, hidden)``."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        read = self.qformer(queries, encoder_hidden_states=features).last_hidden_state
        return self.language_projection(read)


class ResamplerConnector(nn.Module):
    """Flamingo's Perceiver resampler, followed by a linear if ``hidden`` is given."""

    def __init__(self, width: int, tokens: int, hidden: int | None) -> None:
        super().__init__()
        self.resampler = PerceiverResampler(dim=width, num_latents=tokens)
        self.projection = nn.Identity() if hidden is None else nn.Linear(width, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, patches, width)`` to ``(batch, tokens, hidden or width)``."""
        return self.projection(self.resampler(features[:, None, None])[:, 0])


class AnyResConnector(nn.Module):
    """LLaVA's MLP on the tiles of square images, packed without newlines."""

    def __init__(self, width: int, side: int, hidden: int, images: int, saved: str) -> None:
        super().__init__()
        pixels = ANYRES_TILES * side
        self.projector = MLPProjector(width, hidden, saved=saved)
        self.packer = AnyResPacker(hidden, Tiling(((pixels, pixels),), side, side, newline=False))
        device = self.projector.linear_1.weight.device
        self.plan = self.packer.plan([(pixels, pixels)] * images, device=device)

    def forward(self, features: Tensor) -> Tensor:
        """Tiles ``(images * tiles, patches, width)`` to packed rows ``(rows, hidden)``."""
        return self.packer(self.projector(features), self.plan)


# ---- modules of each connector ----


def _features(point: DesignPoint, *, grid: bool, tiles: int | None = None) -> Any:
    """A function that makes the vision encoder's output for all tiles, requiring gradients."""
    tower = point.model.tower
    rows = tower.side**2 if grid else tower.tokens
    batch = point.prompts * point.images * (tower.tiles if tiles is None else tiles)
    return lambda: (torch.randn(batch, rows, tower.width, requires_grad=True),)


def _whole_image(point: DesignPoint) -> Any:
    """A function that makes the vision encoder's output with all tiles of an image in one row."""
    tower = point.model.tower
    shape = (point.prompts * point.images, tower.tiles * tower.tokens, tower.width)
    return lambda: (torch.randn(shape, requires_grad=True),)


def linear(point: DesignPoint) -> list[ConnectorModule]:
    make = functools.partial(nn.Linear, point.model.tower.width, point.model.language.hidden)
    return [ConnectorModule(make, _features(point, grid=True))]


def mlp(point: DesignPoint) -> list[ConnectorModule]:
    width, hidden = point.model.tower.width, point.model.language.hidden
    make = functools.partial(MLPProjector, width, hidden, saved=point.saved)
    return [ConnectorModule(make, _features(point, grid=True))]


def pool(point: DesignPoint) -> list[ConnectorModule]:
    width, hidden = point.model.tower.width, point.model.language.hidden
    stride = _stride(point)
    make = functools.partial(PooledMLPProjector, width, hidden, stride=stride)
    return [ConnectorModule(make, _features(point, grid=True))]


def merge(point: DesignPoint) -> list[ConnectorModule]:
    tower, hidden = point.model.tower, point.model.language.hidden
    keep = math.ceil(point.tokens / tower.tiles)

    def make() -> nn.Module:
        return nn.Sequential(
            TokenMerger(keep=keep), MLPProjector(tower.width, hidden, saved=point.saved)
        )

    return [ConnectorModule(make, _features(point, grid=True))]


def shuffle(point: DesignPoint) -> list[ConnectorModule]:
    width, hidden = point.model.tower.width, point.model.language.hidden
    make = functools.partial(PixelShuffleProjector, width, hidden, factor=_stride(point))
    return [ConnectorModule(make, _features(point, grid=True))]


def qformer(point: DesignPoint) -> list[ConnectorModule]:
    width, hidden = point.model.tower.width, point.model.language.hidden
    make = functools.partial(QFormerConnector, width, point.tokens, hidden)
    return [ConnectorModule(make, _whole_image(point))]


def resampler(point: DesignPoint) -> list[ConnectorModule]:
    width, hidden = point.model.tower.width, point.model.language.hidden
    make = functools.partial(ResamplerConnector, width, point.tokens, hidden)
    return [ConnectorModule(make, _whole_image(point))]


def gated(point: DesignPoint) -> list[ConnectorModule]:
    width, language = point.model.tower.width, point.model.language
    resampler = functools.partial(ResamplerConnector, width, point.tokens, None)
    block = functools.partial(
        GatedCrossAttentionBlock, dim=language.hidden, dim_visual=width,
        dim_head=language.head_dim, heads=language.heads,
    )  # fmt: skip

    def inputs() -> tuple[Tensor, ...]:
        # Each image has its own image token, if there are enough tokens.
        text, images = max(point.text, point.images), point.images
        x = torch.randn(point.prompts, text, language.hidden, requires_grad=True)
        media = torch.randn(point.prompts, images, point.tokens, width, requires_grad=True)
        named = torch.zeros(point.prompts, text, dtype=torch.bool)
        named[:, : images * (text // images) : text // images] = True
        return x, media, named

    return [
        ConnectorModule(resampler, _whole_image(point)),
        ConnectorModule(block, inputs, gated_blocks(point.model)),
    ]


def anyres(point: DesignPoint) -> list[ConnectorModule]:
    tower, hidden = point.model.tower, point.model.language.hidden
    make = functools.partial(
        AnyResConnector, tower.width, tower.side, hidden, point.prompts * point.images, point.saved
    )
    return [ConnectorModule(make, _features(point, grid=True, tiles=ANYRES_TILES**2 + 1))]


# ---- numbers of tokens ----


def every_patch(model: ModelShape) -> list[int]:
    return [model.tower.patches]


def windows(model: ModelShape) -> list[int]:
    """Numbers of tokens for the pooling strides from 2 that divide the grid."""
    side, tiles = model.tower.side, model.tower.tiles
    strides = [s for s in range(2, MAX_STRIDE + 1) if side % s == 0]
    return [tiles * (side // s) ** 2 for s in strides]


def blocks(model: ModelShape) -> list[int]:
    """Numbers of tokens for the block sizes that the norm after the pixel shuffle supports."""
    side, tiles, width = model.tower.side, model.tower.tiles, model.tower.width
    most = math.isqrt(MAX_FEATURES // width)
    return [tiles * (side // s) ** 2 for s in range(2, most + 1) if side % s == 0]


def _stride(point: DesignPoint) -> int:
    tower = point.model.tower
    return tower.side // math.isqrt(point.tokens // tower.tiles)


def quarter(model: ModelShape) -> list[int]:
    return [model.tower.tiles * math.ceil(model.tower.side**2 / 4)]


def with_tiles(model: ModelShape) -> list[int]:
    # Not for a vision encoder that tiles already.
    return [(ANYRES_TILES**2 + 1) * model.tower.side**2] if model.tower.tiles == 1 else []


def gated_blocks(model: ModelShape) -> int:
    return math.ceil(model.language.layers / GATED_EVERY)
