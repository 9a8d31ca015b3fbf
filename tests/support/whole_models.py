"""Whole models of four families, for tests of wrappers around a model.

Each has another kind of connector: LLaVA an MLP, BLIP-2 a Q-Former, IDEFICS a Perceiver resampler
and gated layers, Llama 3.2 Vision gated layers.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import vlm_fast
from tests.support import tiny_flamingos, tiny_llava, tiny_qformers

LANGUAGE = r".*(language_model|model|decoder)\.layers\.\d+\.self_attn\.(q|v)_proj"


class Family(NamedTuple):
    """How to build a model of a family.

    Attributes:
        make: builds the unpatched model in eval mode.
        given: builds its inputs.
        lora_targets: a regex of linears inside connectors, as users pass it to LoRA.
        connectors: names of the modules that FSDP2 shards as units.
        layers: the name of a list of layers of the language model.
        images: the inputs that a batch of text does not have.
    """

    make: Callable[[], Any]
    given: Callable[[], dict[str, Any]]
    lora_targets: str
    connectors: tuple[str, ...]
    layers: str
    images: tuple[str, ...] = ("pixel_values",)


def _blip2() -> Any:
    """BLIP-2 without dropout, so that training can be compared."""
    model, given = tiny_qformers.whole("Blip2ForConditionalGeneration")
    for module in model.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, given


FAMILIES = {
    "llava": Family(
        tiny_llava.llava, tiny_llava.prompt,
        r".*multi_modal_projector\.linear_[12]",
        ("model.multi_modal_projector",), "model.language_model.layers",
    ),
    "blip2": Family(
        lambda: _blip2()[0], lambda: _blip2()[1],
        r".*qformer.*attention\.(query|key|value)",
        ("qformer",), "language_model.model.decoder.layers",
    ),
    "idefics": Family(
        tiny_flamingos.idefics, tiny_flamingos.idefics_inputs,
        r".*(perceiver_resampler\.blocks\.\d+\.0|gated_cross_attn_layers\.\d+\.cross_attn)"
        r"\.(q|v)_proj",
        ("model.perceiver_resampler", "model.gated_cross_attn_layers.0",
         "model.gated_cross_attn_layers.1"),
        "model.layers", ("pixel_values", "image_attention_mask"),
    ),
    "mllama": Family(
        tiny_flamingos.mllama, tiny_flamingos.mllama_inputs,
        r".*cross_attn\.(q|v)_proj|model\.multi_modal_projector",
        ("model.language_model.layers.1", "model.language_model.layers.3"),
        "model.language_model.layers",
        ("pixel_values", "aspect_ratio_mask", "aspect_ratio_ids", "cross_attention_mask"),
    ),
}  # fmt: skip
every_family = pytest.mark.parametrize("family", FAMILIES)


def pair(family: str) -> tuple[Any, Any, dict[str, Any]]:
    """A model, a patched copy, and inputs with labels."""
    plain = FAMILIES[family].make()
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast, strict=True)
    return plain, fast, with_labels(FAMILIES[family].given())


def with_labels(given: dict[str, Any]) -> dict[str, Any]:
    ids = given["input_ids"]
    return given | {"labels": ids.masked_fill((ids == tiny_llava.IMAGE_TOKEN) | (ids > 97), -100)}


def step(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Logits, loss and all gradients, which may be None."""
    model.zero_grad(set_to_none=True)
    output = model(**given)
    output.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": output.logits.detach(), "loss": output.loss.detach()} | found


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], rtol=1e-4, atol=1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] is None) == (expected is None), name
        if expected is not None:
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(
                ours[name], expected, rtol=rtol, atol=atol * scale,
                msg=lambda m, name=name: f"{name}: {m}",
            )  # fmt: skip


def distance(found: dict[str, Any], exact: dict[str, Any]) -> torch.Tensor:
    """Mean relative error of gradients, without those that are zero up to rounding."""
    sizes = {name: exact[name].double().norm() for name in found}
    largest = max(sizes.values())
    errors = [
        (found[name].double() - exact[name]).norm() / size
        for name, size in sizes.items()
        if size > 1e-5 * largest
    ]
    assert len(errors) > 10
    return torch.stack(errors).mean()


def reasons(model):
    return [why for why in vlm_fast.explain(model).values() if why is not None]


def same_logits(ours, theirs, given):
    with torch.no_grad():
        found, expected = (m(**given).logits for m in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
