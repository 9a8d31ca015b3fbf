"""The modules that each kind of connector is made of, and how many tokens it can give."""

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
GATED_EVERY = 4  # layers of the language model to a gated block: OpenFlamingo-9B, IDEFICS-9B
ANYRES_TILES = 2  # tiles along a side, besides the base tile: 672 pixels of LLaVA-NeXT


@dataclass(frozen=True)
class Point:
    """A connector at one number of tokens in one model.

    Attributes:
        model: whose tower and language model it joins.
        connector: which, by name.
        tokens: of an image, that the language model sees.
        images: how many in a prompt; prompts: how many at once.
        text: tokens of text in a prompt; only gated cross-attention works on them.
        saved: what the backward of an MLP keeps (`vlm_fast.ops.mlp`).
    """

    model: ModelShape
    connector: str
    tokens: int
    images: int = 1
    prompts: int = 1
    text: int = 1
    saved: str = "preactivation"


@dataclass(frozen=True)
class Piece:
    """A module of a connector, and its arguments; ``times``: how often it stands in the model."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    times: int = 1


# ---- modules that put those of `vlm_fast.modules` in a row ----


class QFormerConnector(nn.Module):
    """BLIP-2's queries, Q-Former and ``language_projection``, without dropout."""

    def __init__(self, width: int, tokens: int, hidden: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.randn(1, tokens, QFORMER_WIDTH))
        self.qformer = QFormer(encoder_hidden_size=width).eval()
        self.language_projection = nn.Linear(QFORMER_WIDTH, hidden)

    def forward(self, features: Tensor) -> Tensor:
        queries = self.query_tokens.expand(len(features), -1, -1)
        read = self.qformer(queries, encoder_hidden_states=features).last_hidden_state
        return self.language_projection(read)


class ResamplerConnector(nn.Module):
    """Flamingo's resampler, and a linear to the language model's width where there is one."""

    def __init__(self, width: int, tokens: int, hidden: int | None) -> None:
        super().__init__()
        self.resampler = PerceiverResampler(dim=width, num_latents=tokens)
        self.projection = nn.Identity() if hidden is None else nn.Linear(width, hidden)

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(self.resampler(features[:, None, None])[:, 0])


class AnyResConnector(nn.Module):
    """LLaVA's MLP on the tiles of square images, packed; as many rows as there are patches."""

    def __init__(self, width: int, side: int, hidden: int, images: int, saved: str) -> None:
        super().__init__()
        pixels = ANYRES_TILES * side
        self.projector = MLPProjector(width, hidden, saved=saved)
        self.packer = AnyResPacker(hidden, Tiling(((pixels, pixels),), side, side, newline=False))
        device = self.projector.linear_1.weight.device
        self.plan = self.packer.plan([(pixels, pixels)] * images, device=device)

    def forward(self, features: Tensor) -> Tensor:
        return self.packer(self.projector(features), self.plan)


# ---- the pieces of each kind, as it is called ----


def _features(point: Point, *, grid: bool, tiles: int | None = None) -> Any:
    """A maker of what the tower hands over, of all tiles; it is trained too."""
    tower = point.model.tower
    rows = tower.side**2 if grid else tower.tokens
    batch = point.prompts * point.images * (tower.tiles if tiles is None else tiles)
    return lambda: (torch.randn(batch, rows, tower.width, requires_grad=True),)


def _whole_image(point: Point) -> Any:
    """Of all tiles of an image at once."""
    tower = point.model.tower
    shape = (point.prompts * point.images, tower.tiles * tower.tokens, tower.width)
    return lambda: (torch.randn(shape, requires_grad=True),)


def linear(point: Point) -> list[Piece]:
    make = functools.partial(nn.Linear, point.model.tower.width, point.model.language.hidden)
    return [Piece(make, _features(point, grid=True))]


def mlp(point: Point) -> list[Piece]:
    width, hidden = point.model.tower.width, point.model.language.hidden
    make = functools.partial(MLPProjector, width, hidden, saved=point.saved)
    return [Piece(make, _features(point, grid=True))]


def pool(point: Point) -> list[Piece]:
    width, hidden = point.model.tower.width, point.model.language.hidden
    stride = _stride(point)
    make = functools.partial(PooledMLPProjector, width, hidden, stride=stride)
    return [Piece(make, _features(point, grid=True))]


def merge(point: Point) -> list[Piece]:
    tower, hidden = point.model.tower, point.model.language.hidden
    keep = math.ceil(point.tokens / tower.tiles)

    def make() -> nn.Module:
        return nn.Sequential(
            TokenMerger(keep=keep), MLPProjector(tower.width, hidden, saved=point.saved)
        )

    return [Piece(make, _features(point, grid=True))]


def shuffle(point: Point) -> list[Piece]:
    width, hidden = point.model.tower.width, point.model.language.hidden
    make = functools.partial(PixelShuffleProjector, width, hidden, factor=_stride(point))
    return [Piece(make, _features(point, grid=True))]


def qformer(point: Point) -> list[Piece]:
    width, hidden = point.model.tower.width, point.model.language.hidden
    make = functools.partial(QFormerConnector, width, point.tokens, hidden)
    return [Piece(make, _whole_image(point))]


def resampler(point: Point) -> list[Piece]:
    width, hidden = point.model.tower.width, point.model.language.hidden
    make = functools.partial(ResamplerConnector, width, point.tokens, hidden)
    return [Piece(make, _whole_image(point))]


def gated(point: Point) -> list[Piece]:
    width, language = point.model.tower.width, point.model.language
    resampler = functools.partial(ResamplerConnector, width, point.tokens, None)
    block = functools.partial(
        GatedCrossAttentionBlock, dim=language.hidden, dim_visual=width,
        dim_head=language.head_dim, heads=language.heads,
    )  # fmt: skip

    def inputs() -> tuple[Tensor, ...]:
        # Each image is named at a token of its own, as far as there are tokens.
        text, images = max(point.text, point.images), point.images
        x = torch.randn(point.prompts, text, language.hidden, requires_grad=True)
        media = torch.randn(point.prompts, images, point.tokens, width, requires_grad=True)
        named = torch.zeros(point.prompts, text, dtype=torch.bool)
        named[:, : images * (text // images) : text // images] = True
        return x, media, named

    return [Piece(resampler, _whole_image(point)), Piece(block, inputs, gated_blocks(point.model))]


def anyres(point: Point) -> list[Piece]:
    tower, hidden = point.model.tower, point.model.language.hidden
    make = functools.partial(
        AnyResConnector, tower.width, tower.side, hidden, point.prompts * point.images, point.saved
    )
    return [Piece(make, _features(point, grid=True, tiles=ANYRES_TILES**2 + 1))]


# ---- how many tokens ----


def every_patch(model: ModelShape) -> list[int]:
    return [model.tower.patches]


def windows(model: ModelShape) -> list[int]:
    """Of the strides from 2 that divide the grid."""
    side, tiles = model.tower.side, model.tower.tiles
    strides = [s for s in range(2, MAX_STRIDE + 1) if side % s == 0]
    return [tiles * (side // s) ** 2 for s in strides]


def blocks(model: ModelShape) -> list[int]:
    """Of the factors whose blocks the norm behind the shuffle can hold."""
    side, tiles, width = model.tower.side, model.tower.tiles, model.tower.width
    most = math.isqrt(MAX_FEATURES // width)
    return [tiles * (side // s) ** 2 for s in range(2, most + 1) if side % s == 0]


def _stride(point: Point) -> int:
    tower = point.model.tower
    return tower.side // math.isqrt(point.tokens // tower.tiles)


def quarter(model: ModelShape) -> list[int]:
    return [model.tower.tiles * math.ceil(model.tower.side**2 / 4)]


def with_tiles(model: ModelShape) -> list[int]:
    # A tower that tiles already gains nothing.
    return [(ANYRES_TILES**2 + 1) * model.tower.side**2] if model.tower.tiles == 1 else []


def gated_blocks(model: ModelShape) -> int:
    return math.ceil(model.language.layers / GATED_EVERY)
