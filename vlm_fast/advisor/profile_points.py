"""The points of a profile, in the order of their worth; what is measured of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from vlm_fast.advisor.connector_modules import DesignPoint
from vlm_fast.advisor.connectors import CONNECTORS, media_bytes, module_costs, work
from vlm_fast.advisor.language_model import key_value_bytes, step_flops
from vlm_fast.advisor.model_shapes import ModelShape
from vlm_fast.devtools.timing import Times
from vlm_fast.ops.mlp import SAVED

TOKENS = (576, 288, 144, 64, 32, 2880)
BATCHES = (1, 4)
MODES = ("forward", "training")


@dataclass
class LanguageShare:
    """The language model's part of a step: of images and text, all layers.

    Attributes:
        tokens: of each sequence.
        flops: counted, of all layers and sequences.
        modelled_seconds: these at the rate of a large matrix product, as measured here.
        layer: times of one layer, or None.
        seconds: of all layers, and the basis of that: "measured" (one layer's median times their
            number), "extrapolated" (the FLOPs at the rate of the timed layer that is nearest in
            size), or "modelled" (none was timed).
    """

    tokens: int
    flops: int
    modelled_seconds: float = 0.0
    layer: Times | None = None
    seconds: float = 0.0
    basis: str = "modelled"


@dataclass
class ProfileRow:
    """A point of the profile.

    Attributes:
        point: what was asked; mode: "forward" (no gradients) or "training" (and backward).
        visual_tokens: of an image, in the sequence; patches: of an image, in the tower.
        parameters, forward_flops, forward_bytes, backward_flops, backward_bytes: of the connector,
            by the cost models; of the backward 0 where there is none.
        counted_saved_bytes: what the connector keeps for backward, by level, counted.
        key_value_bytes: of the images of the batch, in the language model's cache.
        language: its share.
        timed_flops: of one step of each piece, as it is timed.
        times: of the connector; peak_bytes: its largest memory; saved_bytes: what its forward kept.
        not_measured: why these are None.
        seconds: connector and language model; memory_bytes: the connector's weights and peak, and
            the images' keys and values.
        on_pareto_front: whether no other point of this batch beats it in seconds, memory and tokens seen.
    """

    point: DesignPoint
    mode: str
    visual_tokens: int
    patches: int
    parameters: int
    forward_flops: int
    forward_bytes: int
    backward_flops: int
    backward_bytes: int
    counted_saved_bytes: dict[str, int]
    key_value_bytes: int
    language: LanguageShare
    timed_flops: int
    times: Times | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    not_measured: str | None = "not begun"
    seconds: float | None = None
    memory_bytes: int | None = None
    on_pareto_front: bool = False

    @property
    def title(self) -> str:
        """Connector, tokens, and the level where there are several."""
        words = f"{CONNECTORS[self.point.connector].title}, {self.point.tokens}"
        leveled = self.mode == "training" and CONNECTORS[self.point.connector].has_levels
        return f"{words}, saved={self.point.saved}" if leveled else words


@dataclass
class PointGroup:
    """Points measured in turns: alternatives that give as many tokens, in one batch and level."""

    rows: list[ProfileRow] = field(default_factory=list)

    @property
    def title(self) -> str:
        point = self.rows[0].point
        return f"{point.tokens} visual tokens, batch {point.prompts}"


@dataclass
class LayerGroup:
    """A layer of the language model at one length and batch, and the points whose share that is."""

    rows: list[ProfileRow] = field(default_factory=list)

    @property
    def title(self) -> str:
        row = self.rows[0]
        return f"a layer of the language model, {row.point.prompts} x {row.language.tokens} tokens"


def points(
    model: ModelShape,
    connectors: Iterable[str],
    tokens: Sequence[int],
    batches: Sequence[int],
    levels: Sequence[str],
    mode: str,
    text: int,
    dtype: torch.dtype,
) -> list[PointGroup | LayerGroup]:
    """All points there are of these, grouped, and the layers they need, those of most worth first.

    The first batch and level come before the next; of these, numbers of tokens that a connector has
    of its own before others; of equal worth, the least work.

    Raises:
        ValueError: no connector can give one of the numbers of tokens; the message says which do.
    """
    connectors = list(connectors)
    groups: dict[tuple[int, bool, bool, int, int, int], PointGroup | LayerGroup] = {}
    worth_of_layer: dict[tuple[int, int], tuple[int, bool, bool, int, int, int]] = {}
    for n in tokens:
        reasons = [CONNECTORS[name].why_not(model, n) for name in connectors]
        if all(reasons):
            raise ValueError(f"nothing gives {n} tokens: {'; '.join(filter(None, reasons))}")
        for name, reason in zip(connectors, reasons, strict=True):
            if reason is not None:
                continue
            strange = n not in CONNECTORS[name].counts(model)
            leveled = mode == "training" and CONNECTORS[name].has_levels
            for level, saved in enumerate(levels if leveled else levels[:1]):
                for b, batch in enumerate(batches):
                    row = _row(
                        DesignPoint(model, name, n, prompts=batch, text=text, saved=saved),
                        mode,
                        dtype,
                    )
                    key = (b + level, strange, False, n, b, level)
                    groups.setdefault(key, PointGroup()).rows.append(row)
                    of_layer = (row.language.tokens, batch)
                    key = (b + level, strange, True, *of_layer, 0)
                    first = min(key, worth_of_layer.get(of_layer, key))
                    known = groups.pop(worth_of_layer.get(of_layer, key), LayerGroup())
                    known.rows.append(row)
                    worth_of_layer[of_layer], groups[first] = first, known

    def worth(key: tuple[int, bool, bool, int, int, int]) -> tuple[int, bool, float]:
        return *key[:2], timed_flops(groups[key])

    return [groups[key] for key in sorted(groups, key=worth)]


def timed_flops(group: PointGroup | LayerGroup) -> float:
    """FLOPs of each point's pieces once, or of the layer: to compare groups by."""
    if isinstance(group, LayerGroup):
        return group.rows[0].language.flops / group.rows[0].point.model.language.layers
    return sum(row.timed_flops for row in group.rows)


def _row(point: DesignPoint, mode: str, dtype: torch.dtype) -> ProfileRow:
    connector, language = CONNECTORS[point.connector], point.model.language
    backward = mode == "training"
    done = work(point, dtype, backward=backward)
    in_sequence = point.tokens if connector.in_sequence else 0
    cached = in_sequence * key_value_bytes(language, dtype) + media_bytes(point, dtype)
    levels = SAVED if connector.has_levels else ("",)
    counted = {
        level: work(replace(point, saved=level), dtype, backward=backward).saved_bytes
        for level in levels
    }
    sequence = in_sequence + point.text
    flops = point.prompts * step_flops(language, sequence, backward)
    once = [w.cost for w in module_costs(point, dtype, backward=backward)]
    timed = sum(cost.forward_flops + cost.backward_flops for cost in once)
    return ProfileRow(
        point=point, mode=mode, visual_tokens=in_sequence, patches=connector.patches(point.model),
        parameters=done.parameters, **asdict(done.cost), counted_saved_bytes=counted,
        key_value_bytes=point.prompts * cached, language=LanguageShare(sequence, flops),
        timed_flops=timed,
    )  # fmt: skip
