"""Patch mergers and poolings, as modules and patched, against transformers' classes."""

import copy
import types

import pytest
import torch
import transformers
from torch import nn

import vlm_fast
from tests.support.randomised_modules import assert_close, gradients, randomised
from tests.support.tiny_models import build
from vlm_fast.modules import (
    PatchMerger,
    PixelShuffleProjector,
    PooledMLPProjector,
    PooledNormProjector,
    SpatialPool,
)
from vlm_fast.modules.parameter_access.norm import RMSNorm
from vlm_fast.patching.models.internvl import DeferredPixelShuffle


def qwen(family, name, after=False):
    module = getattr(transformers.models, family)
    kind = getattr(getattr(module, f"modeling_{family}"), name)
    if family in ("qwen2_vl", "qwen2_5_vl"):
        return kind(dim=16, context_dim=12)
    config = types.SimpleNamespace(hidden_size=12, spatial_merge_size=2, out_hidden_size=16)
    return kind(config, use_postshuffle_norm=after)


QWENS = [
    (("qwen2_vl", "PatchMerger"), dict(keys="qwen2")),
    (("qwen2_5_vl", "Qwen2_5_VLPatchMerger"), dict(keys="qwen2", norm="rms")),
    (("qwen3_vl", "Qwen3VLVisionPatchMerger"), {}),
    (("qwen3_vl", "Qwen3VLVisionPatchMerger", True), dict(norm_after=True)),
]


@pytest.mark.parametrize("theirs, options", QWENS, ids=lambda value: str(value))
def test_patch_merger_matches_qwen(theirs, options):
    theirs, ours = randomised(qwen(*theirs)), PatchMerger(12, 16, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(24, 12)
    with vlm_fast.strict():
        assert_close(gradients(ours, x), gradients(theirs, x))


def test_merger_undoes_window_order():
    merger, x = randomised(PatchMerger(12, 16, keys="qwen2", norm="rms")), torch.randn(24, 12)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    expected = merger(x)[torch.argsort(order)]
    torch.testing.assert_close(merger(x, order), expected)


@pytest.mark.parametrize("options", [options for _, options in QWENS], ids=str)
def test_no_patches_give_zero_gradients_to_all_parameters(options):
    y, *grads = gradients(PatchMerger(12, 16, **options), torch.randn(0, 12))
    assert y.shape == (0, 16)
    assert all(g is not None and not g.any() for g in grads)


@pytest.mark.parametrize("option", ["norm", "keys"])
def test_unknown_merger_options_raise(option):
    with pytest.raises(ValueError, match=f"PatchMerger: {option} is 'else', expected"):
        PatchMerger(12, 16, **{option: "else"})


def internvl_projector():
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    sizes = dict(
        vision_config=types.SimpleNamespace(hidden_size=12),
        text_config=types.SimpleNamespace(hidden_size=16),
    )
    return randomised(
        InternVLMultiModalProjector(
            types.SimpleNamespace(**sizes, downsample_ratio=0.5, projector_hidden_act="gelu")
        )
    )


def test_pixel_shuffle_projector_matches_internvl():
    from transformers.models.internvl.modeling_internvl import InternVLModel

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.projector = internvl_projector()

        def forward(self, x):
            shuffled = InternVLModel.pixel_shuffle(None, x.view(2, 4, 4, 12), 0.5)
            return self.projector(shuffled.reshape(2, 4, 48))

    theirs, ours = Theirs(), PixelShuffleProjector(12, 16)
    ours.load_state_dict(theirs.projector.state_dict())
    x = torch.randn(2, 16, 12)
    with vlm_fast.strict():
        assert_close(gradients(ours, x), gradients(theirs, x))
        assert ours(torch.randn(1, 8, 12), height=2, width=4).shape == (1, 2, 16)


def test_spatial_pool_module():
    x = torch.randn(2, 16, 3)
    expected = nn.functional.avg_pool2d(x.view(2, 4, 4, 3).permute(0, 3, 1, 2), 2)
    torch.testing.assert_close(SpatialPool()(x), expected.flatten(2).transpose(1, 2))
    assert SpatialPool(3, "bilinear")(x, height=2, width=8).shape == (2, 3, 3)
    assert "mode='max'" in repr(SpatialPool(mode="max"))


def test_pooled_mlp_matches_perception_lm():
    theirs, x = perception_lm()
    ours = PooledMLPProjector(6, 8)
    ours.load_state_dict(randomised(theirs).state_dict())
    with vlm_fast.strict():
        assert_close(gradients(ours, x), gradients(theirs, x))
    with pytest.raises(ValueError, match="mode is 'max', expected one of"):
        PooledMLPProjector(6, 8, mode="max")


def test_pooled_norm_matches_gemma3():
    theirs, x = t5gemma2()
    ours = PooledNormProjector(6, 8, stride=4)
    ours.load_state_dict(randomised(theirs).state_dict())
    with vlm_fast.strict():
        assert_close(gradients(ours, x), gradients(theirs, x))
        assert ours(torch.randn(1, 32, 6), height=4, width=8).shape == (1, 2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_matches_transformers(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.mistral3.modeling_mistral3 import Mistral3RMSNorm

    for ours, theirs in (
        (RMSNorm(24), Mistral3RMSNorm(24)),
        (RMSNorm(24, unit_offset=True), Gemma3RMSNorm(24)),
    ):
        theirs = randomised(theirs).to(dtype)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 5, 24, dtype=dtype)
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.to(dtype)(x), theirs(x), rtol=2 * ulp, atol=1e-6)


# ---- patched ----


def modernvbert():
    from transformers.models.modernvbert.modeling_modernvbert import ModernVBertConnector

    vision, text = types.SimpleNamespace(hidden_size=6), types.SimpleNamespace(hidden_size=8)
    config = types.SimpleNamespace(pixel_shuffle_factor=2, vision_config=vision, text_config=text)
    return ModernVBertConnector(config), torch.randn(2, 16, 6)


def t5gemma2():
    from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2MultiModalProjector

    vision = types.SimpleNamespace(
        hidden_size=6, layer_norm_eps=1e-6, image_size=16, patch_size=2
    )  # fmt: skip
    text = types.SimpleNamespace(hidden_size=8)
    config = types.SimpleNamespace(vision_config=vision, text_config=text, mm_tokens_per_image=4)
    return T5Gemma2MultiModalProjector(config), torch.randn(2, 64, 6)


def perception_lm():
    from transformers.models.perception_lm.modeling_perception_lm import (
        PerceptionLMMultiModalProjector,
    )

    vision = types.SimpleNamespace(model_args={"embed_dim": 6})
    text = types.SimpleNamespace(hidden_size=8)
    config = types.SimpleNamespace(
        vision_config=vision, text_config=text, projector_pooling_ratio=2
    )  # fmt: skip
    return PerceptionLMMultiModalProjector(config), torch.randn(2, 16, 6)


ALONE = {
    "FusedConnector": modernvbert,
    "FusedPooledNorm": t5gemma2,
    "FusedPooledMLP": perception_lm,
}


@pytest.mark.parametrize("kind", ALONE)
def test_patched_class_matches_unpatched(kind):
    module, x = ALONE[kind]()
    randomised(module)
    expected = gradients(module, x)
    report = vlm_fast.patch(module)
    assert report.patched[""].endswith(f"by {kind}")
    with vlm_fast.strict():
        assert_close(gradients(module, x), expected)
    assert vlm_fast.explain(module) == {"": None}


def qwen25():
    return qwen("qwen2_5_vl", "Qwen2_5_VLPatchMerger"), torch.randn(24, 12)


@pytest.mark.parametrize("make", [*ALONE.values(), qwen25])
def test_compiles_to_one_graph(make):
    module, x = make()
    expected = gradients(randomised(module), x)
    vlm_fast.patch(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with vlm_fast.strict():
        assert_close(gradients(compiled, x), expected)


@pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")
def test_unsupported_grids_run_the_original_forward():
    module, _ = perception_lm()
    x = torch.randn(2, 25, 6)
    expected = gradients(module, x)
    vlm_fast.patch(module)
    assert_close(gradients(module, x), expected)
    with vlm_fast.strict(), pytest.raises(RuntimeError, match="not a square that the ratio"):
        module(x)


def test_pooling_runs_before_the_second_linear():
    model, inputs = build("llava_onevision")
    rows, linear_2 = [], model.model.multi_modal_projector.linear_2
    weight = linear_2.weight
    videos = {"pixel_values": inputs["pixel_values_videos"]}
    with torch.no_grad():
        before = model.model.get_video_features(**videos, return_dict=True).pooler_output
        vlm_fast.patch(model)
        with vlm_fast.strict(), Rows(weight, rows):
            after = model.model.get_video_features(**videos, return_dict=True).pooler_output
        torch.testing.assert_close(after, before, rtol=1e-4, atol=2e-6)
        assert rows == [4 * 4]  # 4 frames with 2 x 2 pooled from 4 x 4 tokens each
        # A hook on the projector sees its result.
        seen = []
        model.model.multi_modal_projector.register_forward_hook(lambda *args: seen.append(args[2]))
        after = model.model.get_video_features(**videos, return_dict=True).pooler_output
    torch.testing.assert_close(after, before, rtol=1e-4, atol=2e-6)
    assert seen[0].shape == (4, 16, 32)


class Rows(torch.overrides.TorchFunctionMode):
    """Record the number of rows that each weight is multiplied with."""

    def __init__(self, weight, rows):
        super().__init__()
        self.weight, self.rows = weight, rows

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear and args[1] is self.weight:
            self.rows.append(args[0].shape[:-1].numel())
        return function(*args, **(kwargs or {}))


# ---- InternVL's deferred shuffle ----


def deferred_shuffle():
    x = torch.randn(2, 4, 4, 3)
    from transformers.models.internvl.modeling_internvl import InternVLModel

    return x.reshape(2, 2, 2, 12).as_subclass(DeferredPixelShuffle), InternVLModel.pixel_shuffle(
        None, x
    )


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x + 1,
        lambda x: 2 * x,
        lambda x: x.detach(),
        lambda x: x[0],
        lambda x: x.reshape(-1),
        lambda x: x.reshape(2, -1, 12) + 0,
        lambda x: torch.cat([x, x]),
        lambda x: nn.functional.linear(x, torch.ones(3, 12)),
        copy.deepcopy,
    ],
)
def test_reading_the_deferred_tensor_shuffles_it(look):
    unshuffled, shuffled = deferred_shuffle()
    found = look(unshuffled)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, look(shuffled))


def test_reading_the_shape_does_not_shuffle():
    unshuffled, _ = deferred_shuffle()
    assert unshuffled.shape == (2, 2, 2, 12) and unshuffled.size(3) == 12 and unshuffled.ndim == 4
    assert type(unshuffled.reshape(2, -1, 12)) is DeferredPixelShuffle
    assert vlm_fast.stats().get("pixel_shuffle_norm", {"fast": 0})["fast"] == 0


@pytest.mark.parametrize("name", ["internvl", "qianfan_ocr"])
def test_internvl_fuses_shuffle_and_norm(name):
    model, inputs = build(name)
    vlm_fast.patch(model)
    with vlm_fast.strict(), torch.no_grad():
        model(**inputs)
    assert vlm_fast.stats()["norm_mlp"]["fast"] == 1
