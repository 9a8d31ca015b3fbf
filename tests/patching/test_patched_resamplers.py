"""Patched resamplers of Idefics2, Aria and Kosmos: parity, masks, fallbacks."""

import copy

import pytest
import torch

import vlm_fast
from tests.support import tiny_resamplers
from tests.support.cases import assert_right
from tests.support.randomised_modules import assert_as_accurate, in_double, results
from tests.support.tiny_models import build


def idefics2():
    return tiny_resamplers.idefics2()[0].model.connector


def idefics2_inputs(dtype, hidden):
    torch.manual_seed(1)
    mask = torch.ones(3, 17, dtype=torch.bool)
    if hidden:
        mask[0, 9:] = mask[2, :3] = False
        mask[1] = False
    return torch.randn(3, 17, 24).to(dtype), mask


def aria():
    projector = build("aria")[0].model.multi_modal_projector
    projector.patch_to_query_dict = {17: 5, 9: 3}
    return projector


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


def assert_same(fast, plain, x, mask):
    assert_as_accurate(fast, plain, x, mask)
    with torch.no_grad():
        true, *wide = in_double(plain, x, mask)
        assert_right({"y": fast(x, mask)}, lambda: {"y": plain(x, mask)}, {"y": true(*wide)}, "y")


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


def kosmos(version):
    return getattr(tiny_resamplers, version)()[0].image_to_text_projection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", ["kosmos2", "kosmos2_5"])
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
    found, exact = results(fast, x), results(*in_double(plain, x))
    # It shifts all scores equally, so its exact gradient is zero; rounding errors are left.
    largest = found.pop("x_attn.k_proj.bias").abs().max()
    assert largest <= torch.finfo(dtype).eps * found["x_attn.v_proj.bias"].abs().max()
    assert_right(found, lambda: results(plain, x), exact, "output")


def test_kosmos_with_eager_attention_returns_attention_maps():
    plain = kosmos("kosmos2")
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
