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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from vlm_fast.advisor import connector_modules as modules
from vlm_fast.advisor.connector_modules import ANYRES_TILES, Piece, Point, gated_blocks
from vlm_fast.advisor.cost_counter import NOTHING, Work, count
from vlm_fast.advisor.model_shapes import ModelShape


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
    made_of = CONNECTORS[point.connector].pieces(point)
    return sum((w * p.times for w, p in zip(parts, made_of, strict=True)), NOTHING)


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
        made_of = CONNECTORS[point.connector].pieces(point)
        return tuple(count(p.make, p.inputs, backward=backward) for p in made_of)
    finally:
        torch.set_default_dtype(before)


def media_bytes(point: Point, dtype: torch.dtype) -> int:
    """Keys and values of one image in all gated blocks; 0 for the other connectors."""
    if CONNECTORS[point.connector].in_sequence:
        return 0
    language = point.model.language
    inner = language.heads * language.head_dim
    return 2 * gated_blocks(point.model) * point.tokens * inner * dtype.itemsize


CONNECTORS = {
    connector.name: connector
    for connector in (
        Connector(
            "linear", "Linear", ("linear",), modules.every_patch, modules.linear, bends=False,
        ),
        Connector(
            "mlp", "MLP", ("MLP",), modules.every_patch, modules.mlp, saves=True, ops=("mlp",),
            results=(("models.llava", "projector, ", 1024),),
        ),
        Connector(
            "pool", "MLP and pooling", ("MLP", "pooling"), modules.windows, modules.pool,
            ops=("spatial_pool",),
        ),
        Connector(
            "merge", "Token merging and MLP", ("token merging", "MLP"), modules.quarter,
            modules.merge, free=True, saves=True, ops=("bipartite_match", "merge_tokens", "mlp"),
            results=(("tokens", "LLaVA's projector of", 1024),),
        ),
        Connector(
            "shuffle", "Pixel shuffle and MLP", ("pixel shuffle", "norm", "MLP"), modules.blocks,
            modules.shuffle, ops=("pixel_shuffle_norm", "mlp"),
            results=(("mergers", "InternVL shuffle and norm", 1024),),
        ),
        Connector(
            "qformer", "Q-Former", ("queries", "12 layers", "projection"), lambda model: [32],
            modules.qformer, free=True,
            ops=("self_attention", "cross_attention", "stacked_linear", "mlp", "add_layer_norm"),
            results=(
                ("models.blip2", "Q-Former, ", 1408), ("qformer", "BLIP-2, ", 1408),
                ("qformer", "BLIP-2 with ViT-L, ", 1024),
            ),
        ),
        Connector(
            "resampler", "Perceiver resampler", ("latents", "6 layers", "projection"),
            lambda model: [64], modules.resampler, free=True, ops=("cross_attention", "mlp"),
            results=(
                ("flamingo", "IDEFICS resampler", 1280), ("models.idefics", "resampler, ", 1280),
            ),
        ),
        Connector(
            "gated", "Gated cross-attention", ("latents", "6 layers", "gated blocks"),
            lambda model: [64], modules.gated, free=True, in_sequence=False,
            ops=("cross_attention", "media_cross_attention", "gated_add", "gated_add_norm", "mlp"),
            results=(
                ("flamingo", "media attention", 1024), ("models.idefics", "gated layer, ", 1280),
                ("models.mllama", "cross-attention layer, ", 7680),
            ),
        ),
        Connector(
            "anyres", "AnyRes and MLP", ("tiling", "MLP", "packing"), modules.with_tiles,
            modules.anyres, saves=True, ops=("mlp", "anyres_pack"),
            results=(("anyres", "LLaVA-NeXT", 1024),),
        ),
    )
}  # fmt: skip
