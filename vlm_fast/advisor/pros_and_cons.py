"""Reasons for and against a connector, in words and with its own figures."""

from __future__ import annotations

from vlm_fast.advisor.connector_modules import GATED_EVERY, gated_blocks
from vlm_fast.advisor.model_shapes import ModelShape
from vlm_fast.advisor.option import Option

Pair = tuple[tuple[str, ...], tuple[str, ...]]
MUCH, LITTLE = 0.9, 0.5  # shares of the context

# What the papers say, by connector and scenario; "" applies to every scenario.
FOR = {
    "linear": {
        "iteration": "one matrix; trained in two stages, the first of it alone (arXiv 2304.08485)"
    },
    "mlp": {
        "documents": "no token is averaged or dropped before the language model reads it",
        "iteration": "two matrices; trained in two stages, the first of it alone (2310.03744)",
    },
    "pool": {"": "the middle way: fewer tokens at no parameter more than the MLP's"},
    "merge": {"": "the middle way: unlike tokens stay apart, alike ones merge; no parameter more"},
    "shuffle": {"": "fewer tokens, and no feature is averaged: they stand side by side"},
    "qformer": {
        "concurrency": "as many tokens for an image of any size, and few",
        "dialogue": "as many tokens for an image of any size, and few",
    },
    "resampler": {
        "concurrency": "as many tokens for an image of any size",
        "dialogue": "as many tokens for images and for videos of any length",
    },
    "gated": {
        "dialogue": "made for images between text, each read where it is named; the language "
        "model stays frozen (arXiv 2204.14198)",
    },
    "anyres": {"documents": "the tower sees the image in tiles, at twice the resolution"},
}
AGAINST = {
    "linear": {"documents": "nothing between tower and language model bends"},
    "qformer": {
        "documents": "queries are taught by captions, which seldom tell what small print says",
        "iteration": "has a stage of pretraining of its own, with three losses (arXiv 2301.12597)",
    },
    "resampler": {"iteration": "latents start from noise: more data before they are of use"},
    "gated": {"iteration": "changes the language model's layers"},
    "anyres": {
        "concurrency": "five images to the tower, and to the cache, for each one",
        "dialogue": "five images to the tower, and to the cache, for each one",
        "iteration": "tiling and packing to get right",
    },
}


def reasons(
    option: Option, others: list[Option], model: ModelShape, context: int, scenario: str
) -> Pair:
    """Reasons for and against an option, those with figures first.

    Args:
        option: the option.
        others: all options, to compare with.
        model: shapes.
        context: length of the language model's sequence in tokens.
        scenario: its name.
    """
    good, bad = [], []
    if option.seen_tokens >= option.patches:
        good.append(f"all {option.patches} patches reach the language model")
    else:
        bad.append(
            f"{option.patches} patches become {option.seen_tokens} ({option.compression:.3g}x): "
            "small print and small things go first"
        )
    share = option.text_tokens_left / context
    left = f"{max(0, option.text_tokens_left)} of {context} tokens are left for text"
    if share >= MUCH:
        good.append(left)
    elif share < LITTLE:
        bad.append(left)
    if option.prefill_flops:
        part = option.prefill_flops_of_images / option.prefill_flops
        line = f"images are {part:.0%} of the prefill"
        (bad if part > LITTLE else good).append(line)
    if option.connector == "gated":
        bad.append(
            f"{option.parameters / 1e9:.2f} billion parameters, in {gated_blocks(model)} blocks "
            f"(every {GATED_EVERY} layers) and a resampler"
        )
    elif scenario == "iteration":
        least = min(other.parameters for other in others)
        side = good if option.parameters == least else bad
        side.append(f"{option.parameters / 1e6:.3g} million parameters to train")
    if option.published:
        good.append(f"what {model.title} was published with")
    for said, where in ((good, FOR), (bad, AGAINST)):
        words = where.get(option.connector, {})
        said += [words[key] for key in ("", scenario) if key in words]
    return tuple(good), tuple(bad)
