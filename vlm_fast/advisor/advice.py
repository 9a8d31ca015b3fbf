"""Rank connectors and numbers of visual tokens for a use, with reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from vlm_fast.advisor.connector_modules import DesignPoint
from vlm_fast.advisor.connectors import CONNECTORS, connector_cost, media_bytes
from vlm_fast.advisor.language_model import (
    key_value_bytes,
    language_parameters,
    prefill_flops,
    tower_parameters,
)
from vlm_fast.advisor.model_shapes import ModelShape, model_shape
from vlm_fast.advisor.option import Option
from vlm_fast.advisor.pros_and_cons import reasons
from vlm_fast.advisor.published_results import measurements
from vlm_fast.ops.mlp import SAVED

MOST_WINDOWS = 2  # largest numbers of tokens listed for connectors that offer many, such as pooling


@dataclass(frozen=True)
class Scenario:
    """A use of a model, and how options are ranked for it.

    Attributes:
        title: in prose.
        rule: the order in words.
        order: sort key of an option; the smallest comes first.
        images: default number of images per prompt.
        requests: default number of concurrent requests.
    """

    title: str
    rule: str
    order: Callable[[Option], tuple[Any, ...]]
    images: int = 1
    requests: int = 1


SCENARIOS = {
    "documents": Scenario(
        "documents and fine detail",
        "the most tokens seen of an image; of as many, what is not linear (LLaVA-1.5's MLP read "
        "better than LLaVA's linear: arXiv 2310.03744, section 3.2); then the fewest FLOPs",
        lambda o: (-o.seen_tokens, not CONNECTORS[o.connector].nonlinear, o.flops),
    ),
    "concurrency": Scenario(
        "many requests at once",
        "the least memory for all requests: the weights once, keys and values of each; "
        "then the fewest FLOPs",
        lambda o: (o.memory_bytes, o.flops),
        requests=64,
    ),
    "dialogue": Scenario(
        "dialogue about several images",
        "the most tokens left for text; then the fewest FLOPs",
        lambda o: (-o.text_tokens_left, o.flops),
        images=8,
    ),
    "iteration": Scenario(
        "fast iteration",
        "the fewest parameters to train; of as many, the fewest parts; then the fewest FLOPs",
        lambda o: (o.parameters, len(CONNECTORS[o.connector].parts), o.flops),
    ),
}


@dataclass(frozen=True)
class Advice:
    """The ranked options and the question that they answer.

    Attributes:
        scenario, model, context, memory, images, requests, text, dtype: see `advise`.
        rule: the order in words.
        source: where the numbers of the model's shape come from.
        options: the best first, infeasible ones last.
    """

    scenario: str
    rule: str
    model: str
    source: str
    context: int
    memory: int | None
    images: int
    requests: int
    text: int
    dtype: str
    options: tuple[Option, ...]

    @property
    def best(self) -> Option | None:
        """The first option, or None if no option is feasible."""
        first = self.options[0] if self.options else None
        return None if first is None or first.infeasible else first

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def advise(
    scenario: str = "documents",
    model: str | ModelShape = "llava-1.5-7b",
    *,
    context: int | None = None,
    memory: int | None = None,
    images: int | None = None,
    requests: int | None = None,
    text: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    connectors: Iterable[str] | None = None,
) -> Advice:
    """Rank the connectors for a use.

    Nothing is computed: FLOPs and bytes are those of the ops' cost models, with the modules on the
    meta device (`vlm_fast.advisor.cost_counter`). Measured times come from results files.

    An option that leaves fewer than ``text`` tokens of the context, or needs more than ``memory``,
    comes last, with the reason. The others are ordered

    - documents: by the most seen tokens per image, then nonlinear connectors, then fewest FLOPs;
    - concurrency: by the least memory for all requests (weights once, keys and values of each);
    - dialogue: by the most tokens left for text, then fewest FLOPs;
    - iteration: by the fewest parameters to train, then fewest parts, then fewest FLOPs.

    FLOPs are those of connector and prefill. Memory counts weights, keys and values in ``dtype``,
    but no activations. Answer quality is not known; the number of seen tokens stands for it.

    Args:
        scenario: "documents", "concurrency", "dialogue" or "iteration".
        model: a `ModelShape` or its name in `vlm_fast.advisor.MODELS`.
        context: length of the language model's sequence in tokens; None is the model's maximum.
        memory: bytes for weights, keys and values; None means no limit.
        images: per prompt; None is the scenario's default.
        requests: at the same time; None is the scenario's default.
        text: text tokens that a request needs, including its answer.
        dtype: of weights, keys and values.
        connectors: names to choose from; None means all of `vlm_fast.advisor.CONNECTORS`.

    Raises:
        ValueError: a name is unknown, or a number is out of range.
    """
    shape = model_shape(model) if isinstance(model, str) else model
    names = list(CONNECTORS) if connectors is None else list(connectors)
    _check_names("scenario", [scenario], SCENARIOS)
    _check_names("connectors", names, CONNECTORS)
    chosen = SCENARIOS[scenario]
    context = shape.language.context if context is None else context
    images = chosen.images if images is None else images
    requests = chosen.requests if requests is None else requests
    least = dict(context=(context, 1), images=(images, 1), requests=(requests, 1), text=(text, 1))
    if memory is not None:
        least["memory"] = (memory, 1)
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise ValueError(f"{name} is {value}, expected {lowest} or more")
    found = [
        _option(
            DesignPoint(shape, name, tokens, images, text=text), context, memory, requests, dtype
        )
        for name in names
        for tokens in CONNECTORS[name].token_counts(shape)[:MOST_WINDOWS]
    ]
    explained = [_with_reasons(option, found, shape, context, scenario) for option in found]
    ordered = sorted(explained, key=lambda o: (o.infeasible is not None, *chosen.order(o)))
    return Advice(
        scenario, chosen.rule, shape.title, shape.source, context, memory, images, requests, text,
        str(dtype).removeprefix("torch."), tuple(ordered),
    )  # fmt: skip


def _check_names(argument: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{argument} is {name!r}, expected one of {', '.join(known)}")


def _option(
    point: DesignPoint, context: int, memory: int | None, requests: int, dtype: torch.dtype
) -> Option:
    model, connector = point.model, CONNECTORS[point.connector]
    language = model.language
    in_sequence = point.tokens if connector.in_sequence else 0
    sequence = point.images * in_sequence + point.text
    done = connector_cost(point, dtype)
    levels = SAVED if connector.has_levels else ("",)
    saved = {
        level: connector_cost(replace(point, saved=level), dtype).saved_bytes for level in levels
    }
    held = sequence * key_value_bytes(language, dtype) + point.images * media_bytes(point, dtype)
    of_models = language_parameters(language) + tower_parameters(model.tower)
    weights = (of_models + done.parameters) * dtype.itemsize
    whole, text = prefill_flops(language, sequence), prefill_flops(language, point.text)
    left = context - point.images * in_sequence
    patches = connector.patches(model)
    option = Option(
        connector=connector.name,
        title=connector.title,
        published=connector.name == model.connector,
        visual_tokens=in_sequence,
        seen_tokens=point.tokens,
        patches=patches,
        compression=patches / point.tokens,
        text_tokens_left=left,
        parameters=done.parameters,
        cost=done.cost,
        saved_bytes=saved,
        prefill_flops=whole,
        prefill_flops_of_images=whole - text,
        prefill_bytes=language_parameters(language) * dtype.itemsize
        + sequence * key_value_bytes(language, dtype),
        key_value_bytes=held,
        weight_bytes=weights,
        memory_bytes=weights + requests * held,
        most_requests=None if memory is None else max(0, (memory - weights) // held),
        infeasible=None,
    )
    return replace(option, infeasible=_why_infeasible(option, point, context, memory, requests))


def _why_infeasible(
    option: Option, point: DesignPoint, context: int, memory: int | None, requests: int
) -> str | None:
    if option.text_tokens_left < point.text:
        taken = context - option.text_tokens_left
        return (
            f"{point.images} x {option.visual_tokens} visual tokens leave "
            f"{max(0, option.text_tokens_left)} of {context} for {point.text} of text"
            + (f" ({taken - context} too many)" if taken > context else "")
        )
    if memory is not None and option.memory_bytes > memory:
        state = requests * option.key_value_bytes
        return (
            f"needs {option.memory_bytes / 1e9:.1f} GB of {memory / 1e9:.1f} GB: "
            f"{option.weight_bytes / 1e9:.1f} GB of weights, {state / 1e9:.1f} GB of keys and "
            f"values of {requests} requests"
        )
    return None


def _with_reasons(
    option: Option, others: list[Option], model: ModelShape, context: int, scenario: str
) -> Option:
    good, bad = reasons(option, others, model, context, scenario)
    found = measurements(CONNECTORS[option.connector], model)
    return replace(option, reasons_for=good, reasons_against=bad, measured=tuple(found))
