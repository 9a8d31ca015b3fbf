"""Patched resamplers of Idefics2, Aria and Kosmos: parity, masks, fallbacks."""

import copy

import pytest
import torch
import transformers
from transformers.models.aria.modeling_aria import AriaProjector
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector
from transformers.models.kosmos2 import modeling_kosmos2 as kosmos2
from transformers.models.kosmos2_5 import modeling_kosmos2_5 as kosmos2_5

import vlm_fast
from tests.support.cases import assert_right
from vlm_fast.verification import tolerance


def randomised_parameters(module):
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.1 if parameter.ndim == 1 else 0.05
            parameter.add_(torch.randn_like(parameter) * spread)
    return module.eval()


def idefics2(attention="eager"):
    torch.manual_seed(0)
    config = transformers.Idefics2Config(
        vision_config=dict(hidden_size=24, image_size=16, patch_size=4, num_attention_heads=2),
        perceiver_config=dict(
            resampler_n_latents=5, resampler_depth=2, resampler_n_heads=4, resampler_head_dim=12,
            num_key_value_heads=2,
        ),
        text_config=dict(model_type="mistral", hidden_size=32, intermediate_size=48),
        attn_implementation=attention,
    )  # fmt: skip
    return randomised_parameters(Idefics2Connector(config))


def idefics2_inputs(dtype, hidden):
    torch.manual_seed(1)
    mask = torch.ones(3, 17, dtype=torch.bool)
    if hidden:
        mask[0, 9:] = mask[2, :3] = False
        mask[1] = False
    return torch.randn(3, 17, 24).to(dtype), mask


def aria():
    torch.manual_seed(0)
    config = transformers.AriaConfig(
        vision_config=dict(model_type="idefics3_vision", hidden_size=24, num_attention_heads=2),
        text_config=dict(
            model_type="aria_text",
            hidden_size=40,
            num_attention_heads=4,
            moe_num_experts=2,
            vocab_size=99,
        ),
        projector_patch_to_query_dict={17: 5, 9: 3},
    )
    return randomised_parameters(AriaProjector(config))


def aria_inputs(dtype, hidden):
    torch.manual_seed(1)
    mask = torch.zeros(3, 17, dtype=torch.bool)
    mask[0, 9:] = mask[2, :3] = True
    return torch.randn(3, 17, 24).to(dtype), mask if hidden else None


FAMILIES = {"idefics2": (idefics2, idefics2_inputs), "aria": (aria, aria_inputs)}
every_family = pytest.mark.parametrize("family", FAMILIES)


def pair(family, dtype=torch.float32):
    plain = FAMILIES[family][0]().to(dtype)
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast, strict=True)
    return plain, fast


def result_and_gradients(module, x, mask):
    x, parameters = x.detach().requires_grad_(), dict(module.named_parameters())
    y = module(x, mask)
    found = torch.autograd.grad(
        y, [x, *parameters.values()], tolerance.random_upstream(y), allow_unused=True
    )
    return dict(zip(["y", "x", *parameters], [y.detach(), *found], strict=True))


def assert_same(fast, plain, x, mask):
    true = copy.deepcopy(plain).double()
    exact = result_and_gradients(true, x.double(), mask)
    assert_right(
        result_and_gradients(fast, x, mask),
        lambda: result_and_gradients(plain, x, mask),
        exact,
        "y",
    )
    with torch.no_grad():
        exact = {"y": true(x.double(), mask)}
        assert_right({"y": fast(x, mask)}, lambda: {"y": plain(x, mask)}, exact, "y")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [False, True], ids=["all", "masked"])
@every_family
def test_parity_with_unpatched(family, hidden, dtype):
    plain, fast = pair(family, dtype)
    with vlm_fast.strict():
        assert_same(fast, plain, *FAMILIES[family][1](dtype, hidden))


def write_in_place(parameter, value):
    with torch.no_grad():
        parameter.copy_(value)


def write_through_data(parameter, value):
    parameter.data.copy_(value)


def replace_data(parameter, value):
    parameter.data = value.clone()


def write_through_numpy(parameter, value):
    parameter.detach().numpy()[...] = value.numpy()


def write_in_inference_mode(parameter, value):
    with torch.inference_mode():
        parameter.data.copy_(value)


WAYS = [
    write_in_place, write_through_data, replace_data, write_through_numpy, write_in_inference_mode,
]  # fmt: skip


@pytest.mark.parametrize("write", WAYS)
@pytest.mark.parametrize("patches", [17, 90], ids=["few", "composed"])
def test_weights_written_in_place_are_used(write, patches):
    """Writes by averaging weights or merging adapters may not bump a tensor's version."""
    plain, fast = pair("aria")
    for m in (plain, fast):
        m.patch_to_query_dict = {patches: 5}
    x = torch.randn(2, patches, aria_inputs(torch.float32, False)[0].shape[2])
    with torch.no_grad():
        for scale in (1.0, 1.5, -2.0):
            for name in ("k_proj", "v_proj"):
                for m in (fast, plain):
                    weight = m.cross_attn.get_submodule(name).weight
                    write(weight, weight.detach() * scale)
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)


def test_aria_projections_with_bias_are_not_folded():
    plain, fast = pair("aria")
    bias = torch.nn.Parameter(torch.randn(24))
    for m in (fast, plain):
        m.cross_attn.v_proj.bias = bias
    x, mask = aria_inputs(torch.float32, True)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, mask), plain(x, mask), rtol=1e-5, atol=1e-5)


@every_family
def test_hook_on_a_linear_fires(family):
    plain, fast = pair(family)
    for m in (plain, fast):
        linear = next(c for n, c in m.named_modules() if n.endswith("k_proj"))
        linear.register_forward_hook(lambda module, x, y: y + 1)
    x, mask = FAMILIES[family][1](torch.float32, True)
    with pytest.warns(vlm_fast.VlmFastFallbackWarning, match="hooks"):
        torch.testing.assert_close(fast(x, mask), plain(x, mask), rtol=1e-4, atol=1e-5)


def kosmos(version):
    torch.manual_seed(0)
    config = getattr(transformers, f"Kosmos2{version}Config")(
        vision_config=dict(hidden_size=24),
        text_config=dict(embed_dim=32, attention_heads=2, attention_dropout=0.0),
        latent_query_num=5,
    )
    for part in (config, config.text_config):
        part._attn_implementation = "eager"
    module = {"": kosmos2, "_5": kosmos2_5}[version]
    return randomised_parameters(getattr(module, f"Kosmos2{version}ImageToTextProjection")(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", ["", "_5"])
def test_kosmos_matches_eager_attention(version, dtype):
    plain = kosmos(version).to(dtype)
    fast = copy.deepcopy(plain)
    fast.x_attn.config._attn_implementation = (
        "sdpa"  # the default attention, which is wrong for Kosmos-2
    )
    vlm_fast.patch(fast, strict=True)
    torch.manual_seed(1)
    x = torch.randn(3, 17, 24).to(dtype)
    with vlm_fast.strict():
        assert fast(x)[1] is None
    found, exact = first(fast, x), first(copy.deepcopy(plain).double(), x.double())
    # It shifts all scores equally, so its exact gradient is zero.
    assert not found.pop("x_attn.k_proj.bias").any()
    assert_right(found, lambda: first(plain, x), exact, "y")


def first(module, x):
    """The features without the maps, and all gradients."""
    x, parameters = x.detach().requires_grad_(), dict(module.named_parameters())
    y = module(x)[0]
    found = torch.autograd.grad(y, [x, *parameters.values()], tolerance.random_upstream(y))
    return dict(zip(["y", "x", *parameters], [y.detach(), *found], strict=True))


def test_kosmos_with_eager_attention_returns_attention_maps():
    plain = kosmos("")
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast, strict=True)
    x = torch.randn(2, 17, 24)
    with pytest.warns(vlm_fast.VlmFastFallbackWarning, match="maps"):
        for ours, theirs in zip(fast(x), plain(x), strict=True):
            assert torch.equal(ours, theirs)


@every_family
def test_zero_images_and_revert(family):
    plain, fast = pair(family)
    x, mask = FAMILIES[family][1](torch.float32, False)
    empty = fast(x[:0], None if mask is None else mask[:0])
    assert empty.shape[0] == 0 and empty.ndim == 3
    empty.sum().backward()
    assert vlm_fast.unpatch(fast) >= 1
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize(
    "family, mask, said",
    [
        ("idefics2", torch.ones(3, 16, dtype=torch.bool), "one for each patch"),
        ("aria", torch.ones(3, 16, dtype=torch.bool), "one for each patch"),
        ("aria", torch.ones(3, 17), "True where hidden"),
    ],
)
def test_invalid_arguments_raise(family, mask, said):
    _, fast = pair(family)
    with pytest.raises((TypeError, ValueError), match=said):
        fast(FAMILIES[family][1](torch.float32, False)[0], mask)


def test_aria_error_lists_valid_patch_counts():
    _, fast = pair("aria")
    with pytest.raises(KeyError, match="16"), pytest.warns(vlm_fast.VlmFastFallbackWarning):
        fast(torch.randn(2, 16, 24))
