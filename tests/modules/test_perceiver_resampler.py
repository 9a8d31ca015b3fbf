"""Perceiver resamplers of Flamingo and IDEFICS: parity, folded weights, errors."""

import copy

import pytest
import torch
from torch import nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

import vlm_fast
from tests.support import reference_flamingo
from tests.support.cases import assert_right
from tests.support.randomised_modules import in_double, results
from vlm_fast.modules import PerceiverResampler

SIZES = dict(dim=40, depth=3, dim_head=24, heads=2, num_latents=5)
EMBEDDED = SIZES | dict(max_num_media=3, max_num_frames=2)


def randomised_parameters(module, dtype):
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.to(dtype)


def flamingo(dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    return randomised_parameters(
        reference_flamingo.PerceiverResampler(**(sizes or EMBEDDED)), dtype
    )


def idefics(dtype=torch.float32, norms=True, depth=3, head=24):
    torch.manual_seed(0)
    config = IdeficsConfig(
        vision_config=dict(embed_dim=40), perceiver_config=dict(qk_layer_norms_perceiver=norms)
    )
    module = randomised_parameters(
        IdeficsPerceiverResampler(config, 40, depth, 2, head, 5), torch.float32
    )
    # Few units are near zero, where rounding decides the gradient of ReLU.
    for _, ff in module.blocks:
        ff.ln.bias.data.add_(torch.randn(40).sign() * 5)
    return module.to(dtype)


def ours(plain, **sizes):
    module = PerceiverResampler(**(sizes or EMBEDDED))
    module.load_state_dict(plain.state_dict(), strict=True)
    return module.to(plain.latents.dtype)


def patched(plain):
    model = torch.nn.ModuleList([copy.deepcopy(plain)])
    vlm_fast.patch(model, strict=True)
    return model[0]


def features(*shape, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(*shape, 40).to(dtype)


def assert_same(module, plain, x):
    exact, found = results(*in_double(plain, x)), results(module, x)
    for name in [name for name in found if "k_layer_norm.bias" in name]:
        # It shifts all scores equally, so its exact gradient is zero.
        assert not found.pop(name).any() and exact[name].abs().max() < 1e-12
    assert_right(found, lambda: results(plain, x), exact, "output")
    module.eval()
    with torch.no_grad():
        true, wide = in_double(plain, x)
        assert_right({"y": module(x)}, lambda: {"y": plain(x)}, {"y": true(wide)}, "y")


every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@every_dtype
def test_parity_with_the_published_formulas(dtype):
    plain = flamingo(dtype)
    with vlm_fast.strict():
        assert_same(ours(plain), plain, features(2, 3, 2, 17, dtype=dtype))
        assert_same(patched(plain), plain, features(2, 2, 1, 17, dtype=dtype))


def test_without_media_and_frame_embeddings():
    plain = flamingo(**SIZES)
    assert_same(ours(plain, **SIZES), plain, features(1, 4, 3, 5))


@every_dtype
@pytest.mark.parametrize("norms, depth, head", [(True, 3, 24), (False, 1, 96), (True, 2, 16)])
def test_parity_with_idefics(norms, depth, head, dtype):
    plain = idefics(dtype, norms, depth, head)
    with vlm_fast.strict():
        assert_same(patched(plain), plain, features(3, 17, dtype=dtype))


@pytest.mark.parametrize("depth", [0, 1])
def test_depths_and_a_single_medium(depth):
    sizes = SIZES | dict(depth=depth)
    plain = flamingo(**sizes)
    for x in (features(2, 3, 1, 7), features(1, 1, 1, 7)):
        torch.testing.assert_close(ours(plain, **sizes)(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(2, 2),
        nn.ModuleList([nn.Linear(2, 2)] * 3),
        nn.ModuleList([reference_flamingo.PerceiverAttention(40), nn.Linear(2, 2)]),
    ],
    ids=["a linear", "three", "no sequence"],
)
def test_unrelated_class_of_the_same_name_is_not_patched(layer):
    stranger = flamingo()
    stranger.layers.append(layer)
    with pytest.warns(UserWarning, match="no connector"):
        report = vlm_fast.patch(stranger)
    assert not report.patched and report.skipped[""].startswith("its ")


@pytest.mark.parametrize("make", [flamingo, idefics])
def test_autocast(make):
    plain = make().eval()
    module = patched(plain)
    x = features(3, 17) if make is idefics else features(2, 2, 1, 17)
    with torch.autocast("cpu", torch.bfloat16), vlm_fast.strict():
        found, native = module(x), plain(x)
    exact = copy.deepcopy(plain).double()(x.double())
    assert found.dtype == native.dtype
    assert (found - exact).abs().max() <= 2 * (native - exact).abs().max()


@pytest.mark.parametrize("make", [flamingo, idefics])
def test_zero_images(make):
    module = patched(make())
    x = features(0, 17) if make is idefics else features(0, 2, 1, 17)
    y = module(x)
    assert y.shape == ((0, 5, 40) if make is idefics else (0, 2, 5, 40))
    y.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(
    "x, said",
    [
        (features(2, 4, 1, 17), "at most 3 media"),
        (features(2, 3, 3, 17), "at most 2 frames"),
        (features(2, 3, 17), r"\(batch, media, frames, features, 40\)"),
        (torch.zeros(1, 1, 1, 17, 41), "40"),
        (None, "NoneType"),
    ],
)
def test_invalid_arguments_raise(x, said):
    with pytest.raises((TypeError, ValueError), match=said):
        ours(flamingo())(x)
