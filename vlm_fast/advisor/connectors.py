"""The connectors to choose from: their numbers of tokens and their modules.

Names, what they do and where they are from:

    linear     the single linear of the first LLaVA                        arXiv 2304.08485
    mlp        LLaVA-1.5's two linears                                      arXiv 2310.03744
    pool       the same, tokens averaged over windows before the second    PerceptionLM
    merge      similar tokens are averaged (ToMe), then the MLP             arXiv 2210.09461
    shuffle    blocks of patches concatenated to one token (InternVL)       arXiv 2404.16821
    qformer    learned queries through BLIP-2's Q-Former                    arXiv 2301.12597
    resampler  learned latents through Flamingo's Perceiver resampler       arXiv 2204.14198
    gated      the resampler, then gated cross-attention in the language model, same paper
    anyres     the image and its tiles through the MLP (LLaVA-NeXT)         arXiv 2408.03326
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from vlm_fast.advisor import connector_modules as modules
from vlm_fast.advisor.connector_modules import (
    ANYRES_TILES,
    ConnectorModule,
    DesignPoint,
    gated_blocks,
)
from vlm_fast.advisor.cost_counter import NO_COST, ModuleCost, count_cost
from vlm_fast.advisor.model_shapes import ModelShape


@dataclass(frozen=True)
class Connector:
    """One kind of connector.

    Attributes:
        name: on the command line.
        title: in prose.
        parts: what it is made of, in order.
        token_counts: the numbers of tokens that it can produce in a model; the first is its usual
            one.
        make_modules: its modules at a design point.
        any_token_count: whether it can produce any number of tokens up to that of its input.
        in_sequence: whether its tokens are part of the language model's sequence.
        has_levels: whether ``saved`` makes a difference.
        nonlinear: whether any part is nonlinear.
        ops: of this package that it uses.
        results: where results files have measurements of it: family (with a dot between levels),
            prefix of the part's name, and width of the vision encoder of the models that it stands
            for.
    """

    name: str
    title: str
    parts: tuple[str, ...]
    token_counts: Callable[[ModelShape], Sequence[int]]
    make_modules: Callable[[DesignPoint], Sequence[ConnectorModule]]
    any_token_count: bool = False
    in_sequence: bool = True
    has_levels: bool = False
    nonlinear: bool = True
    ops: tuple[str, ...] = ()
    results: tuple[tuple[str, str, int], ...] = ()

    def patches(self, model: ModelShape) -> int:
        """Patches of an image that the vision encoder computes for this connector."""
        tiles = ANYRES_TILES**2 + 1 if self.name == "anyres" else model.tower.tiles
        return tiles * model.tower.side**2

    def why_not(self, model: ModelShape, tokens: int) -> str | None:
        """The reason why it cannot produce ``tokens`` tokens in this model, or None."""
        can, tower = self.token_counts(model), model.tower
        if tokens in can:
            return None
        if self.name == "merge" and tokens % tower.tiles:
            return f"{self.title} gives as many tokens of each of {tower.tiles} tiles"
        if self.any_token_count:
            # Merging has to remove at least one token.
            most = tower.patches - 1 if self.name == "merge" else tower.tiles * tower.tokens
            return None if 1 <= tokens <= most else f"{self.title} gives 1 to {most} tokens"
        if not can:
            return f"{self.title} suits no grid of {tower.side} x {tower.side} like this tower's"
        return f"{self.title} gives {' or '.join(map(str, can))} tokens, not {tokens}"


def connector_cost(
    point: DesignPoint, dtype: torch.dtype = torch.bfloat16, *, backward: bool = True
) -> ModuleCost:
    """Cost of the connector at a design point, by the ops' cost models.

    Args:
        point: the connector, model and number of tokens.
        dtype: of parameters and inputs.
        backward: whether to count backward, which takes longest; if False its cost is 0.

    Raises:
        ValueError: the connector cannot produce this number of tokens.
    """
    parts = module_costs(point, dtype, backward=backward)
    made_of = CONNECTORS[point.connector].make_modules(point)
    return sum((w * p.count for w, p in zip(parts, made_of, strict=True)), NO_COST)


def module_costs(
    point: DesignPoint, dtype: torch.dtype, *, backward: bool = True
) -> tuple[ModuleCost, ...]:
    """Cost of each module of the connector, counted once; arguments as in `connector_cost`."""
    connector = CONNECTORS[point.connector]
    reason = connector.why_not(point.model, point.tokens)
    if reason is not None:
        raise ValueError(reason)
    # Normalise fields that make no difference, so that the cache is hit.
    text = 1 if connector.in_sequence else point.text
    saved = point.saved if connector.has_levels else "preactivation"
    return _works(replace(point, text=text, saved=saved), dtype, backward)


@functools.lru_cache(maxsize=1024)
def _works(point: DesignPoint, dtype: torch.dtype, backward: bool) -> tuple[ModuleCost, ...]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        made_of = CONNECTORS[point.connector].make_modules(point)
        return tuple(count_cost(p.make, p.inputs, backward=backward) for p in made_of)
    finally:
        torch.set_default_dtype(before)


def media_bytes(point: DesignPoint, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one image in all gated blocks; 0 for other connectors."""
    if CONNECTORS[point.connector].in_sequence:
        return 0
    language = point.model.language
    inner = language.heads * language.head_dim
    return 2 * gated_blocks(point.model) * point.tokens * inner * dtype.itemsize


CONNECTORS = {
    connector.name: connector
    for connector in (
        Connector(
            "linear", "Linear", ("linear",), modules.every_patch, modules.linear, nonlinear=False,
        ),
        Connector(
            "mlp", "MLP", ("MLP",), modules.every_patch, modules.mlp, has_levels=True, ops=("mlp",),
            results=(("models.llava", "projector, ", 1024),),
        ),
        Connector(
            "pool", "MLP and pooling", ("MLP", "pooling"), modules.windows, modules.pool,
            ops=("spatial_pool",),
        ),
        Connector(
            "merge", "Token merging and MLP", ("token merging", "MLP"), modules.quarter,
            modules.merge, any_token_count=True, has_levels=True,
            ops=("bipartite_match", "merge_tokens", "mlp"),
            results=(("token_merging", "LLaVA's projector of", 1024),),
        ),
        Connector(
            "shuffle", "Pixel shuffle and MLP", ("pixel shuffle", "norm", "MLP"), modules.blocks,
            modules.shuffle, ops=("pixel_shuffle_norm", "mlp"),
            results=(("patch_mergers", "InternVL shuffle and norm", 1024),),
        ),
        Connector(
            "qformer", "Q-Former", ("queries", "12 layers", "projection"), lambda model: [32],
            modules.qformer, any_token_count=True,
            ops=("self_attention", "cross_attention", "stacked_linear", "mlp", "add_layer_norm"),
            results=(
                ("models.blip2", "Q-Former, ", 1408), ("qformer", "BLIP-2, ", 1408),
                ("qformer", "BLIP-2 with ViT-L, ", 1024),
            ),
        ),
        Connector(
            "resampler", "Perceiver resampler", ("latents", "6 layers", "projection"),
            lambda model: [64], modules.resampler, any_token_count=True,
            ops=("cross_attention", "mlp"),
            results=(
                ("gated_cross_attention", "IDEFICS resampler", 1280),
                ("models.idefics", "resampler, ", 1280),
            ),
        ),
        Connector(
            "gated", "Gated cross-attention", ("latents", "6 layers", "gated blocks"),
            lambda model: [64], modules.gated, any_token_count=True, in_sequence=False,
            ops=("cross_attention", "media_cross_attention", "gated_add", "gated_add_norm", "mlp"),
            results=(
                ("gated_cross_attention", "media attention", 1024),
                ("models.idefics", "gated layer, ", 1280),
                ("models.mllama", "cross-attention layer, ", 7680),
            ),
        ),
        Connector(
            "anyres", "AnyRes and MLP", ("tiling", "MLP", "packing"), modules.with_tiles,
            modules.anyres, has_levels=True, ops=("mlp", "anyres_pack"),
            results=(("anyres_packing", "LLaVA-NeXT", 1024),),
        ),
    )
}  # fmt: skip
