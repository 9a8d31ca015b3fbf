"""Exactly which classes of transformers are recognised as connectors, and why the others are not.

The lists hold for the release below; other releases may have more classes or other forwards.
Properties of every release are checked with the installed one.
"""

import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from vlm_fast.modules.fusable_runs import is_linear
from vlm_fast.modules.parameter_access.chain import Chain, find_chain
from vlm_fast.patching.models import anyres, image_token_merge
from vlm_fast.patching.placeholder_masks import MaskSpec

RELEASE = "5.17"
of_release = pytest.mark.skipif(
    transformers.__version__.rsplit(".", 1)[0] != RELEASE,
    reason=f"transformers {transformers.__version__}, the lists are of {RELEASE}",
)

METHOD = f"get_placeholder_mask (transformers {transformers.__version__})"
FORWARD = f"its forward (transformers {transformers.__version__})"
# All other classes with a `get_placeholder_mask` merge by it.
NO_MERGE = {
    **dict.fromkeys(  # the model does not check the count, so the merge may not either
        ["Blip2Model", "Blip2ForConditionalGeneration", "InstructBlipModel",
         "InstructBlipForConditionalGeneration", "InstructBlipVideoForConditionalGeneration"],
        f"{METHOD} takes input_ids, inputs_embeds",
    ),
    "Glm5NextModel": f"{METHOD} uses cumsum, video_end_token_id, video_start_token_id",
    "GlmImageModel": f"{METHOD} uses item",
    "HiggsAudioV2Model": f"{METHOD} uses audio_delay_token_id, embed_tokens",
    "InklingModel": f"{METHOD} uses embed_norm, language_model",
    "NeoMMEModel": f"{METHOD} uses F, document_token_id, expand, pad, pad_token_id",
    **dict.fromkeys(
        ["DeepseekVLHybridModel", "InstructBlipVideoModel"],
        f"{FORWARD} makes its own mask, not by get_placeholder_mask",
    ),
    **dict.fromkeys(
        ["DiffusionGemmaEncoderModel", "Gemma4Model", "Gemma4UnifiedModel"],
        f"{FORWARD} expands the mask",
    ),
    # They delegate to another model or to a method that merges.
    **dict.fromkeys(
        ["Florence2ForConditionalGeneration", "GraniteSpeechModel", "GraniteSpeechPlusModel"]
    ),
}  # fmt: skip

PACK = {"LlavaNextModel", "LlavaNextVideoModel", "LlavaOnevisionModel", "Granite4VisionModel"}

ADAPTER = SimpleNamespace(hidden_size=8, adapter_attn_dim=4)
TIMM = {"model_args": {"embed_dim": 8}}
CHAIN = "its forward is not a chain of its children"
UNTRACED = "its forward cannot be traced"
ARGUMENTS = "its forward takes more than one argument"
# The children before linear_1, the reason for skipping, or None if it is no candidate. In all other
# classes with a linear_1 and a linear_2 there is none before.
PROJECTORS = {
    "InternVLMultiModalProjector": ("layer_norm",),
    "QianfanOCRMultiModalProjector": ("layer_norm",),
    "VipLlavaMultiModalProjector": ("projector_layernorm",),
    "HubertAttnAdapterLayer": ("norm",),
    "UniSpeechAttnAdapterLayer": ("norm",),
    "UniSpeechSatAttnAdapterLayer": ("norm",),
    "Wav2Vec2AttnAdapterLayer": ("norm",),
    "AyaVisionMultiModalProjector": UNTRACED,  # pixel shuffle and SwiGLU
    "Cohere2VisionMultiModalProjector": UNTRACED,  # the same
    "FunAsrNanoMultiModalProjector": UNTRACED,  # encoder layers behind
    "PaddleOCRProjector": UNTRACED,  # a loop over images
    "FunnelPositionwiseFFN": CHAIN,  # a residual
    "Lfm2VlMultiModalProjector": CHAIN,  # pixel unshuffle
    "MiniCPMV4_6DownsampleMLP": CHAIN,  # a view
    "MiniMaxM3VLMultiModalProjector": CHAIN,  # two MLPs
    "PerceptionLMMultiModalProjector": CHAIN,  # permutes and pooling
    "LightOnOcrMultiModalProjector": ARGUMENTS,  # image sizes
    "MiniCPMV4_6ViTWindowAttentionMerger": ARGUMENTS,
    "Mistral3MultiModalProjector": ARGUMENTS,  # image sizes
    "PPFormulaNetMultiModalProjector": ARGUMENTS,  # convolutions
    "VibeVoiceDiffusionHeadFinalLayer": ARGUMENTS,
    "VibeVoiceMultiModalProjector": "its activation VibeVoiceRMSNorm is not one the kernels know",
    # Other children's names.
    "Kimi_K25MultimodalProjection": CHAIN,  # a view
    "Llama4MultiModalProjector": None,  # a single linear
}  # fmt: skip
# Constructor arguments of classes that do not take their model's config.
MADE_FROM = {
    "HubertAttnAdapterLayer": lambda config: [ADAPTER],
    "UniSpeechAttnAdapterLayer": lambda config: [ADAPTER],
    "UniSpeechSatAttnAdapterLayer": lambda config: [ADAPTER],
    "Wav2Vec2AttnAdapterLayer": lambda config: [ADAPTER],
    "MiniCPMV4_6DownsampleMLP": lambda config: [8, 8],
    "MiniCPMV4_6ViTWindowAttentionMerger": lambda config: [config().vision_config],
    "PPFormulaNetMultiModalProjector": lambda config: [config().vision_config],
    "PerceptionLMMultiModalProjector": lambda config: [config(vision_config=TIMM)],
    "VibeVoiceDiffusionHeadFinalLayer": lambda config: [config().diffusion_head_config, 8],
    "VibeVoiceMultiModalProjector": lambda config: [8, 8],
}


def written(*texts):
    """Classes whose source contains all of these strings, with their model type."""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if path.stem != f"modeling_{path.parent.name}":
            continue
        for source in re.split(r"^class ", path.read_text(encoding="utf8"), flags=re.M)[1:]:
            if all(text in source for text in texts):
                yield re.match(r"\w+", source)[0], path.parent.name


ASKING = dict(written("def get_placeholder_mask", ".masked_scatter("))
MERGING = {**dict(written(".masked_scatter(")), **dict(written("def inputs_merger"))}
PACKING = dict(written("def pack_image_features"))
CANDIDATES = dict(written("self.linear_1 =", "self.linear_2 ="))
OTHER_NAMES = {
    "DeepseekVLAligner": "deepseek_vl",
    "Kimi_K25MultimodalProjection": "kimi_k25",
    "Llama4MultiModalProjector": "llama4",
}


def of_transformers(name, model_type):
    return getattr(
        importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}"), name
    )


@of_release
def test_listed_classes_exist():
    assert NO_MERGE.keys() < ASKING.keys() and PACKING.keys() > PACK
    assert PROJECTORS.keys() < {**CANDIDATES, **OTHER_NAMES}.keys()


@of_release
@pytest.mark.parametrize("name", ASKING)
def test_recognised_merges(name):
    found = image_token_merge.recognise(nn.Module.__new__(of_transformers(name, ASKING[name])))
    assert found == NO_MERGE[name] if name in NO_MERGE else isinstance(found, MaskSpec)


@pytest.mark.parametrize("name", sorted(MERGING.keys() - ASKING.keys()))
def test_models_with_own_merge_code_are_reported(name):
    kind = of_transformers(name, MERGING[name])
    forward = inspect.getsource(inspect.unwrap(kind.forward))
    merges = ".masked_scatter(" in forward or "self.inputs_merger(" in forward
    found = image_token_merge.recognise(nn.Module.__new__(kind))
    if merges and issubclass(kind, transformers.PreTrainedModel):
        assert found == f"{FORWARD} merges by itself, without get_placeholder_mask"
    else:
        assert found is None


@pytest.mark.parametrize("name", PACKING)
def test_recognised_anyres_packing(name):
    module = nn.Module.__new__(of_transformers(name, PACKING[name]))
    assert anyres.is_anyres_model(module) == (name in PACK)
    merge = image_token_merge.recognise(module)
    merges = name in PACK and isinstance(merge, MaskSpec)
    assert anyres.recognise(module) == (merge if merges else None)
    assert anyres.recognise_packing(module) == (() if name in PACK and not merges else None)


@of_release
@pytest.mark.parametrize("name", {**CANDIDATES, **OTHER_NAMES})
def test_recognised_projectors(name):
    model_type = CANDIDATES.get(name) or OTHER_NAMES[name]
    config = transformers.CONFIG_MAPPING[model_type.replace("unispeech_sat", "unispeech-sat")]
    with torch.device("meta"):
        arguments = MADE_FROM[name](config) if name in MADE_FROM else [config()]
        module = of_transformers(name, model_type)(*arguments)
        found = find_chain(module)
    expected = PROJECTORS.get(name, ())
    if isinstance(expected, tuple):
        assert isinstance(found, Chain), found
        assert found.calls[:-3] == expected
        assert all(is_linear(getattr(module, call)) for call in found.calls[-3::2])
    elif expected is None:
        assert found is None
    else:
        assert isinstance(found, str) and found.startswith(expected)
