"""The connectors to choose from: how many tokens each gives, and the modules that compute it.

By name, with what each does and where it is from:

    linear     the single linear of the first LLaVA                       arXiv 2304.08485
    mlp        LLaVA-1.5's two linears                                     arXiv 2310.03744
    pool       the same, tokens averaged over windows before the second   PerceptionLM
    merge      similar tokens become their mean, then the MLP (ToMe)       arXiv 2210.09461
    shuffle    blocks of patches side by side in one token (InternVL)      arXiv 2404.16821
    qformer    learned queries through BLIP-2's Q-Former                   arXiv 2301.12597
    resampler  learned latents through Flamingo's Perceiver resampler      arXiv 2204.14198
    gated      the resampler, and gated cross-attention in the language model, same paper
    anyres     the image again in tiles, through the MLP (LLaVA-NeXT)      arXiv 2408.03326
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.anyres import Tiling
from vlm_fast.design.ledger import NOTHING, Work, count
from vlm_fast.design.shapes import ModelShape
from vlm_fast.modules import (
    AnyResPacker,
    GatedCrossAttentionBlock,
    LinearProjector,
    MLPProjector,
    PerceiverResampler,
    PixelShuffleProjector,
    PooledMLPProjector,
    QFormer,
    TokenMerger,
)
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


@dataclass(frozen=True)
class Connector:
    """One kind of connector.

    Attributes:
        name, title: on the command line, and in prose.
        parts: what it is made of, in order.
        counts: of a model, the numbers of tokens it can give; the first is its own.
        free: whether it can give any number up to that of its input.
        pieces: its modules at a point.
        in_sequence: whether its tokens stand in the language model's sequence.
        saves: whether ``saved`` makes a difference.
        bends: whether anything in it is not linear.
        ops: of this package, that it rests on.
        results: what results files measure of it: the family (a dot between levels), the beginning
            of the part, and the width of the tower whose models that stands for.
    """

    name: str
    title: str
    parts: tuple[str, ...]
    counts: Callable[[ModelShape], Sequence[int]]
    pieces: Callable[[Point], Sequence[Piece]]
    free: bool = False
    in_sequence: bool = True
    saves: bool = False
    bends: bool = True
    ops: tuple[str, ...] = ()
    results: tuple[tuple[str, str, int], ...] = ()

    def patches(self, model: ModelShape) -> int:
        """Patches of an image that the tower computes for it."""
        tiles = ANYRES_TILES**2 + 1 if self.name == "anyres" else model.tower.tiles
        return tiles * model.tower.side**2

    def why_not(self, model: ModelShape, tokens: int) -> str | None:
        """Why it cannot give so many tokens in this model, or None."""
        can, tower = self.counts(model), model.tower
        if tokens in can:
            return None
        if self.name == "merge" and tokens % tower.tiles:
            return f"{self.title} gives as many tokens of each of {tower.tiles} tiles"
        if self.free:
            # A merge that merges nothing is no merge.
            most = tower.patches - 1 if self.name == "merge" else tower.tiles * tower.tokens
            return None if 1 <= tokens <= most else f"{self.title} gives 1 to {most} tokens"
        if not can:
            return f"{self.title} suits no grid of {tower.side} x {tower.side} like this tower's"
        return f"{self.title} gives {' or '.join(map(str, can))} tokens, not {tokens}"


def work(point: Point, dtype: torch.dtype = torch.bfloat16, *, backward: bool = True) -> Work:
    """What the connector costs at a point, by the ops' own cost models; see `ledger.count`.

    Without ``backward`` its backward is not counted, which takes longest, and is given as 0.

    Raises:
        ValueError: it cannot give so many tokens.
    """
    parts = works(point, dtype, backward=backward)
    pieces = CONNECTORS[point.connector].pieces(point)
    return sum((w * p.times for w, p in zip(parts, pieces, strict=True)), NOTHING)


def works(point: Point, dtype: torch.dtype, *, backward: bool = True) -> tuple[Work, ...]:
    """The work of each piece, once."""
    connector = CONNECTORS[point.connector]
    reason = connector.why_not(point.model, point.tokens)
    if reason is not None:
        raise ValueError(reason)
    # What makes no difference is not counted twice.
    text = 1 if connector.in_sequence else point.text
    saved = point.saved if connector.saves else "preactivation"
    return _works(replace(point, text=text, saved=saved), dtype, backward)


@functools.lru_cache(maxsize=1024)
def _works(point: Point, dtype: torch.dtype, backward: bool) -> tuple[Work, ...]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        pieces = CONNECTORS[point.connector].pieces(point)
        return tuple(count(p.make, p.inputs, backward=backward) for p in pieces)
    finally:
        torch.set_default_dtype(before)


def media_bytes(point: Point, dtype: torch.dtype) -> int:
    """Keys and values of one image in all gated blocks; 0 for the other connectors."""
    if CONNECTORS[point.connector].in_sequence:
        return 0
    language = point.model.language
    inner = language.heads * language.head_dim
    return 2 * gated_blocks(point.model) * point.tokens * inner * dtype.itemsize


def gated_blocks(model: ModelShape) -> int:
    return math.ceil(model.language.layers / GATED_EVERY)


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


# ---- the pieces of each kind ----


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


def _linear(point: Point) -> list[Piece]:
    make = functools.partial(LinearProjector, point.model.tower.width, point.model.language.hidden)
    return [Piece(make, _features(point, grid=True))]


def _mlp(point: Point) -> list[Piece]:
    width, hidden = point.model.tower.width, point.model.language.hidden
    make = functools.partial(MLPProjector, width, hidden, saved=point.saved)
    return [Piece(make, _features(point, grid=True))]


def _pool(point: Point) -> list[Piece]:
    width, hidden = point.model.tower.width, point.model.language.hidden
    stride = _stride(point)
    make = functools.partial(PooledMLPProjector, width, hidden, stride=stride)
    return [Piece(make, _features(point, grid=True))]


def _merge(point: Point) -> list[Piece]:
    tower, hidden = point.model.tower, point.model.language.hidden
    keep = math.ceil(point.tokens / tower.tiles)

    def make() -> nn.Module:
        return nn.Sequential(
            TokenMerger(keep=keep), MLPProjector(tower.width, hidden, saved=point.saved)
        )

    return [Piece(make, _features(point, grid=True))]


def _shuffle(point: Point) -> list[Piece]:
    width, hidden = point.model.tower.width, point.model.language.hidden
    make = functools.partial(PixelShuffleProjector, width, hidden, factor=_stride(point))
    return [Piece(make, _features(point, grid=True))]


def _qformer(point: Point) -> list[Piece]:
    width, hidden = point.model.tower.width, point.model.language.hidden
    make = functools.partial(QFormerConnector, width, point.tokens, hidden)
    return [Piece(make, _whole_image(point))]


def _resampler(point: Point) -> list[Piece]:
    width, hidden = point.model.tower.width, point.model.language.hidden
    make = functools.partial(ResamplerConnector, width, point.tokens, hidden)
    return [Piece(make, _whole_image(point))]


def _gated(point: Point) -> list[Piece]:
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


def _anyres(point: Point) -> list[Piece]:
    tower, hidden = point.model.tower, point.model.language.hidden
    make = functools.partial(
        AnyResConnector, tower.width, tower.side, hidden, point.prompts * point.images, point.saved
    )
    return [Piece(make, _features(point, grid=True, tiles=ANYRES_TILES**2 + 1))]


# ---- how many tokens ----


def _every_patch(model: ModelShape) -> list[int]:
    return [model.tower.patches]


def _windows(model: ModelShape) -> list[int]:
    """Of the strides from 2 that divide the grid."""
    side, tiles = model.tower.side, model.tower.tiles
    strides = [s for s in range(2, MAX_STRIDE + 1) if side % s == 0]
    return [tiles * (side // s) ** 2 for s in strides]


def _blocks(model: ModelShape) -> list[int]:
    """Of the factors whose blocks the norm behind the shuffle can hold."""
    side, tiles, width = model.tower.side, model.tower.tiles, model.tower.width
    most = math.isqrt(MAX_FEATURES // width)
    return [tiles * (side // s) ** 2 for s in range(2, most + 1) if side % s == 0]


def _stride(point: Point) -> int:
    tower = point.model.tower
    return tower.side // math.isqrt(point.tokens // tower.tiles)


def _quarter(model: ModelShape) -> list[int]:
    return [model.tower.tiles * math.ceil(model.tower.side**2 / 4)]


def _with_tiles(model: ModelShape) -> list[int]:
    # A tower that tiles already gains nothing.
    return [(ANYRES_TILES**2 + 1) * model.tower.side**2] if model.tower.tiles == 1 else []


CONNECTORS = {
    connector.name: connector
    for connector in (
        Connector("linear", "Linear", ("linear",), _every_patch, _linear, bends=False),
        Connector(
            "mlp", "MLP", ("MLP",), _every_patch, _mlp, saves=True, ops=("mlp",),
            results=(("models.llava", "projector, ", 1024),),
        ),
        Connector(
            "pool", "MLP and pooling", ("MLP", "pooling"), _windows, _pool, ops=("spatial_pool",)
        ),
        Connector(
            "merge", "Token merging and MLP", ("token merging", "MLP"), _quarter, _merge,
            free=True, saves=True, ops=("bipartite_match", "merge_tokens", "mlp"),
            results=(("tokens", "LLaVA's projector of", 1024),),
        ),
        Connector(
            "shuffle", "Pixel shuffle and MLP", ("pixel shuffle", "norm", "MLP"), _blocks,
            _shuffle, ops=("pixel_shuffle_norm", "mlp"),
            results=(("mergers", "InternVL shuffle and norm", 1024),),
        ),
        Connector(
            "qformer", "Q-Former", ("queries", "12 layers", "projection"), lambda model: [32],
            _qformer, free=True,
            ops=("self_attention", "absorbed_cross_attention", "cross_attention", "stacked_linear",
                 "mlp", "add_layer_norm"),
            results=(
                ("models.blip2", "Q-Former, ", 1408), ("qformer", "BLIP-2, ", 1408),
                ("qformer", "BLIP-2 with ViT-L, ", 1024),
            ),
        ),
        Connector(
            "resampler", "Perceiver resampler", ("latents", "6 layers", "projection"),
            lambda model: [64], _resampler, free=True, ops=("cross_attention", "mlp"),
            results=(("flamingo", "IDEFICS resampler", 1280),),
        ),
        Connector(
            "gated", "Gated cross-attention", ("latents", "6 layers", "gated blocks"),
            lambda model: [64], _gated, free=True, in_sequence=False,
            ops=("cross_attention", "media_cross_attention", "gated_add", "gated_add_norm", "mlp"),
            results=(
                ("flamingo", "media attention", 1024), ("flamingo", "IDEFICS-9B gated layer", 1280),
                ("models.mllama", "cross-attention layer, ", 7680),
            ),
        ),
        Connector(
            "anyres", "AnyRes and MLP", ("tiling", "MLP", "packing"), _with_tiles, _anyres,
            saves=True, ops=("mlp", "anyres_pack"), results=(("anyres", "LLaVA-NeXT", 1024),),
        ),
    )
}  # fmt: skip
