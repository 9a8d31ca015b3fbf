"""Find the parts of a transformers model that recipes train or freeze, by its module structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

TOWER, CONNECTOR, LANGUAGE = "tower", "connector", "language"
FAMILIES = {
    "llava": "a projector before a language model: children vision_tower, multi_modal_projector "
    "and language_model, as LLaVA's",
    "blip2-retrieval": "Blip2ForImageTextRetrieval: a Q-Former, heads for contrast and matching",
    "blip2": "Blip2ForConditionalGeneration: a Q-Former and a decoder",
    "flamingo": "gated cross-attention within a language model: IDEFICS' or Llama 3.2 Vision's",
}


@dataclass
class ModelParts:
    """The vision encoder and the connector of a model; everything else is the language model.

    Attributes:
        family: one of `FAMILIES`.
        inner: the module whose forward takes pixels and returns hidden states.
        tower: the vision encoder.
        connector: names of the connector's modules and parameters in the whole model.
    """

    family: str
    inner: nn.Module
    tower: nn.Module
    connector: list[str] = field(default_factory=list)

    def label_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
        """Yield name, parameter and part ("tower", "connector" or "language") of each parameter."""
        in_tower = {id(p) for p in self.tower.parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) in in_tower:
                yield name, parameter, TOWER
            elif any(name == own or name.startswith(f"{own}.") for own in self.connector):
                yield name, parameter, CONNECTOR
            else:
                yield name, parameter, LANGUAGE


def find_parts(model: nn.Module) -> ModelParts:
    """The parts of a transformers model, patched or not.

    Raises:
        TypeError: the model belongs to none of `FAMILIES`.
    """
    inner: Any = model.model if isinstance(getattr(model, "model", None), nn.Module) else model
    prefix = "" if inner is model else "model."
    children = dict(inner.named_children())
    if {"vision_tower", "multi_modal_projector", "language_model"} <= children.keys():
        names = ["multi_modal_projector"]
        names += ["image_newline"] if "image_newline" in inner._parameters else []
        return ModelParts("llava", inner, inner.vision_tower, [prefix + name for name in names])
    if {"vision_model", "qformer", "vision_projection", "itm_head"} <= children.keys():
        names = [name for name in children if name != "vision_model"] + list(inner._parameters)
        return ModelParts("blip2-retrieval", inner, inner.vision_model, [prefix + n for n in names])
    if {"vision_model", "qformer", "language_projection", "language_model"} <= children.keys():
        names = ["query_tokens", "qformer", "language_projection"]
        return ModelParts("blip2", inner, inner.vision_model, [prefix + name for name in names])
    if {"vision_model", "gated_cross_attn_layers"} <= children.keys():
        names = [n for n in ("perceiver_resampler", "gated_cross_attn_layers") if n in children]
        return ModelParts("flamingo", inner, inner.vision_model, [prefix + name for name in names])
    language: Any = children.get("language_model")
    layers = getattr(language, "layers", ())
    crossing = [i for i, layer in enumerate(layers) if hasattr(layer, "cross_attn")]
    if "vision_model" in children and "multi_modal_projector" in children and crossing:
        names = ["multi_modal_projector", *(f"language_model.layers.{i}" for i in crossing)]
        return ModelParts("flamingo", inner, inner.vision_model, [prefix + name for name in names])
    known = "; ".join(f"{name}: {what}" for name, what in FAMILIES.items())
    raise TypeError(
        f"vlm_fast.training.recipes: model is a {type(model).__name__}, "
        f"expected one of these families: {known}"
    )
