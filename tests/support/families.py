"""A small model of every family that can be patched, for all supported transformers releases.

`CASES` maps a name to the class that a release must have, and a function that builds a model.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers

from tests.support import tiny_anyres, tiny_flamingos, tiny_models, tiny_qformers, tiny_resamplers
from tests.support.older_configs import adapted_config


class Case(NamedTuple):
    """One model.

    Attributes:
        kind: the name of its class in transformers.
        build: gives the model, in eval mode, and its inputs.
        prepare: changes the model before it is patched, without changing its results.
    """

    kind: str
    build: Callable[[], tuple[Any, dict[str, Any]]]
    prepare: Callable[[Any], Any] = lambda model: model

    @property
    def exists(self) -> bool:
        return hasattr(transformers, self.kind)


def retrieval():
    """BLIP-2's scores of images and texts."""
    config = transformers.Blip2Config(
        vision_config=tiny_qformers.VISION,
        qformer_config=tiny_qformers.QFORMER | dict(use_qformer_text_input=True),
        num_query_tokens=5, image_text_hidden_size=8,
    )  # fmt: skip
    model = tiny_qformers.randomised_parameters(transformers.Blip2ForImageTextRetrieval(config))
    torch.nn.init.normal_(model.query_tokens)
    mask = tiny_qformers.ones_but(2, 6, (1, 2))
    inputs = dict(input_ids=torch.randint(1, 90, (2, 6)) * mask, attention_mask=mask)
    inputs |= dict(pixel_values=torch.randn(2, 3, 16, 16), use_image_text_matching_head=True)
    return model, inputs


def qformer(kind, attention):
    model, inputs = tiny_qformers.whole(kind)
    if attention == "eager":
        for config in (model.qformer.config, model.qformer.encoder.config):
            config._attn_implementation = "eager"
    return model, inputs


def flamingo(name, *arguments, **changes):
    build = getattr(tiny_flamingos, name)
    return build(*arguments, **changes), getattr(tiny_flamingos, f"{name}_inputs")()


def kosmos(version):
    """The resampler returns no attention maps, as with any attention but eager."""
    model, inputs = getattr(tiny_resamplers, version)()
    model.image_to_text_projection.register_forward_hook(lambda module, x, y: (y[0], None))
    return model, inputs


def perception_lm():
    """Perception LM with a CLIP tower in place of its timm tower."""
    from transformers.models.perception_lm import modeling_perception_lm

    tower = transformers.CLIPVisionConfig(
        **{name: value for name, value in tiny_models.CLIP.items() if name != "model_type"}
    )
    config = transformers.PerceptionLMConfig(
        vision_config=dict(model_args=dict(embed_dim=24)),
        text_config=adapted_config(tiny_models.TEXT | dict(model_type="llama")),
        vision_use_cls_token=True, projector_pooling_ratio=2, image_token_id=tiny_models.IMAGE,
        attn_implementation="eager",
    )  # fmt: skip

    def from_config(given, **options):
        if given is config.vision_config:
            return transformers.CLIPVisionModel(tower)
        return transformers.AutoModel.from_config(given, **options)

    auto = mock.Mock(from_config=from_config)
    with mock.patch.object(modeling_perception_lm, "AutoModel", auto):
        model = transformers.PerceptionLMForConditionalGeneration(config)
    tiny_resamplers.randomised_parameters(model)
    return model, tiny_models.prompt(model, [tiny_models.Placeholders(tiny_models.image_sets, 4)])


IDEFICS, MLLAMA = "IdeficsForVisionText2Text", "MllamaForConditionalGeneration"
IDEFICS2, KOSMOS2 = "Idefics2ForConditionalGeneration", "Kosmos2ForConditionalGeneration"
QFORMERS = {
    "blip_2": "Blip2ForConditionalGeneration",
    "instructblip": "InstructBlipForConditionalGeneration",
    "instructblipvideo": "InstructBlipVideoForConditionalGeneration",
}
RAGGED = {
    "llava_next": "LlavaNext", "llava_next_video": "LlavaNextVideo",
    "llava_onevision": "LlavaOnevision",
}  # fmt: skip
CASES = {
    **{
        name: Case(tiny.model, functools.partial(tiny_models.build, name))
        for name, tiny in tiny_models.MODELS.items()
    },
    **{
        name + suffix: Case(kind, functools.partial(qformer, kind, attention))
        for name, kind in QFORMERS.items()
        for suffix, attention in [("", "sdpa"), (" eager", "eager")]
    },
    "blip_2 retrieval": Case("Blip2ForImageTextRetrieval", retrieval),
    "idefics": Case(IDEFICS, lambda: flamingo("idefics")),
    "idefics sdpa": Case(IDEFICS, lambda: flamingo("idefics", "sdpa")),
    "idefics no qk norm": Case(IDEFICS, lambda: flamingo("idefics", qk_layer_norms=False)),
    "mllama": Case(MLLAMA, lambda: flamingo("mllama")),
    "mllama sdpa": Case(MLLAMA, lambda: flamingo("mllama", "sdpa")),
    "idefics2": Case(IDEFICS2, tiny_resamplers.idefics2),
    "idefics2 sdpa": Case(IDEFICS2, lambda: tiny_resamplers.idefics2("sdpa")),
    "kosmos2": Case(KOSMOS2, lambda: kosmos("kosmos2"), tiny_resamplers.of_sdpa),
    "kosmos2 eager": Case(KOSMOS2, tiny_resamplers.kosmos2),
    "kosmos2_5": Case(
        "Kosmos2_5ForConditionalGeneration", lambda: kosmos("kosmos2_5"), tiny_resamplers.of_sdpa
    ),
    "perception_lm": Case("PerceptionLMForConditionalGeneration", perception_lm),
    "granite4_vision": Case(
        "Granite4VisionForConditionalGeneration", lambda: tiny_anyres.ragged("granite4_vision")
    ),
    **{
        f"{name} ragged": Case(
            f"{kind}ForConditionalGeneration", functools.partial(tiny_anyres.ragged, name)
        )
        for name, kind in RAGGED.items()
    },
    "llava_onevision several": Case("LlavaOnevisionForConditionalGeneration", tiny_anyres.several),
}


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """The model of a case and its inputs, deterministic and without dropout."""
    torch.manual_seed(0)
    model, inputs = CASES[name].build()
    for module in model.modules():
        for dropout in ("p", "dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, dropout, None), float):
                setattr(module, dropout, 0.0)
    return model, inputs
