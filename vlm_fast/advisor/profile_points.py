"""The points of a profile in the order of their importance, and what is measured of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from vlm_fast.advisor.connector_modules import DesignPoint
from vlm_fast.advisor.connectors import CONNECTORS, connector_cost, media_bytes, module_costs
from vlm_fast.advisor.language_model import key_value_bytes, step_flops
from vlm_fast.advisor.model_shapes import ModelShape
from vlm_fast.devtools.timing import Times
from vlm_fast.ops.mlp import SAVED

TOKENS = (576, 288, 144, 64, 32, 2880)
BATCHES = (1, 4)
MODES = ("forward", "training")


@dataclass
class LanguageShare:
    """The language model's part of a step: all layers, for images and text.

    Attributes:
        tokens: per sequence.
        flops: counted, of all layers and sequences.
        modelled_seconds: ``flops`` at the measured rate of a large matrix product.
        layer: times of one layer, or None.
        seconds: of all layers.
        basis: of ``seconds``: "measured" (median of one layer times their number), "extrapolated"
            (FLOPs at the rate of the timed layer nearest in size), or "modelled" (no layer was
            timed).
    """

    tokens: int
    flops: int
    modelled_seconds: float = 0.0
    layer: Times | None = None
    seconds: float = 0.0
    basis: str = "modelled"


@dataclass
class ProfileRow:
    """One point of the profile.

    Attributes:
        point: connector, model and sizes.
        mode: "forward" (without gradients) or "training" (forward and backward).
        visual_tokens: per image in the sequence.
        patches: per image in the vision encoder.
        parameters, forward_flops, forward_bytes, backward_flops, backward_bytes: of the connector,
            by the cost models; without backward the last two are 0.
        counted_saved_bytes: memory that the connector keeps for backward by level, counted.
        key_value_bytes: of the batch's images in the language model's cache.
        language: the language model's part.
        timed_flops: of one step of each module, as it is timed.
        times: of the connector.
        peak_bytes: peak memory of the connector.
        saved_bytes: memory that its forward keeps, measured.
        not_measured: the reason why these are None.
        seconds: of connector and language model.
        memory_bytes: weights and peak of the connector, and keys and values of images.
        on_pareto_front: whether no other point of this batch dominates it in seconds, memory and
            seen tokens.
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
        """Connector and number of tokens, and the level if there are several."""
        words = f"{CONNECTORS[self.point.connector].title}, {self.point.tokens}"
        leveled = self.mode == "training" and CONNECTORS[self.point.connector].has_levels
        return f"{words}, saved={self.point.saved}" if leveled else words


@dataclass
class PointGroup:
    """Points measured in turns: alternatives with the same number of tokens, batch and level."""

    rows: list[ProfileRow] = field(default_factory=list)

    @property
    def title(self) -> str:
        point = self.rows[0].point
        return f"{point.tokens} visual tokens, batch {point.prompts}"


@dataclass
class LayerGroup:
    """A layer of the language model at one length and batch, and the points that use its time."""

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
    """All points of a profile in groups, and the layers that they need, most important first.

    The first batch and level come before the next ones. Among these, numbers of tokens that are a
    connector's usual ones come first, then the groups with the least work.

    Args:
        model: shapes.
        connectors: names.
        tokens: numbers of visual tokens per image.
        batches: numbers of prompts at the same time.
        levels: of ``saved``.
        mode: "forward" or "training".
        text: text tokens per prompt.
        dtype: of parameters and inputs.

    Raises:
        ValueError: no connector can produce one of the numbers of tokens.
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
            strange = n not in CONNECTORS[name].token_counts(model)
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
    """FLOPs of one step of each point of a group, or of the layer."""
    if isinstance(group, LayerGroup):
        return group.rows[0].language.flops / group.rows[0].point.model.language.layers
    return sum(row.timed_flops for row in group.rows)


def _row(point: DesignPoint, mode: str, dtype: torch.dtype) -> ProfileRow:
    connector, language = CONNECTORS[point.connector], point.model.language
    backward = mode == "training"
    done = connector_cost(point, dtype, backward=backward)
    in_sequence = point.tokens if connector.in_sequence else 0
    cached = in_sequence * key_value_bytes(language, dtype) + media_bytes(point, dtype)
    levels = SAVED if connector.has_levels else ("",)
    counted = {
        level: connector_cost(replace(point, saved=level), dtype, backward=backward).saved_bytes
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
