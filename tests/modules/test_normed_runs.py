"""A norm before linear, activation, linear runs in one op with them, or is called by itself."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import vlm_fast
from tests.support.randomised_modules import gradients, randomised
from vlm_fast.modules.parameter_access.norm import RMSNorm

WIDTH, HIDDEN = 24, 40
X = torch.arange(2 * 5 * WIDTH).view(2, 5, WIDTH).sin()
NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "LayerNorm without bias": lambda: nn.LayerNorm(WIDTH, bias=False, eps=0.1),
    "Qwen2RMSNorm": lambda: Qwen2RMSNorm(WIDTH, eps=0.1),
    "RMSNorm": lambda: RMSNorm(WIDTH, unit_offset=True),
}


def pair(norm=NORMS["LayerNorm"], dtype=torch.float32):
    """An nn.Sequential as in InternVL's own code, and a patched copy of it."""
    plain = nn.Sequential(norm(), nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
    plain = randomised(plain).to(dtype)
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast, strict=True)
    return plain, fast


def calls_of(fast, plain, x=X):
    """The ops that ran, after a comparison of results and all gradients."""
    for _ in range(2):
        theirs = gradients(plain, x)
        vlm_fast.stats(reset=True)
        ours = gradients(fast, x)
        tolerance = 1e-5 if x.dtype is torch.float32 else 4e-2
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=tolerance)
    counts = vlm_fast.stats(reset=True)
    assert not any(count["fallback"] for count in counts.values())
    return {name for name, count in counts.items() if count["fast"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_norm_and_mlp_are_one_op(norm, dtype):
    plain, fast = pair(norm, dtype)
    assert calls_of(fast, plain, X.to(dtype)) == {"norm_mlp"}


def hook(module):
    module[0].register_forward_hook(lambda module, args, result: result * 2)


def without_weight(module):
    module[0] = nn.LayerNorm(WIDTH, elementwise_affine=False)


def over_two_sizes(module):
    module[0] = nn.LayerNorm((5, WIDTH))


def unknown(module):
    module[0] = nn.GroupNorm(1, 5)


@pytest.mark.parametrize("change", [hook, without_weight, over_two_sizes, unknown])
def test_norm_that_cannot_be_read_is_called(change):
    plain, fast = pair()
    fast(X)
    for module in (plain, fast):
        change(module)
    assert calls_of(fast, plain) == {"mlp"}


def test_too_wide_norm_is_called():
    wide = 8193
    plain = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, 4), nn.GELU(), nn.Linear(4, 4))
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast, strict=True)
    assert calls_of(fast, plain, torch.linspace(-1, 1, 2 * wide).view(2, wide)) == {"mlp"}


def test_input_of_one_dimension_and_none():
    plain, fast = pair()
    assert calls_of(fast, plain, X[0, 0]) == {"mlp"}
    assert calls_of(fast, plain, X[:0]) == {"norm_mlp"}


def test_autocast_computes_the_norm_in_its_own_dtype():
    plain, fast = pair()
    for module in (fast, plain):
        module.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fast(X), plain(X)
    assert ours.dtype is theirs.dtype is torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    assert vlm_fast.stats()["mlp"]["fast"] == 1 and "norm_mlp" not in vlm_fast.stats()


def test_frozen_parameters_get_no_gradient():
    plain, fast = pair()
    for module in (plain, fast):
        module[0].requires_grad_(False)
        module[1].weight.requires_grad_(False)
    found = {}
    for name, module in (("fast", fast), ("plain", plain)):
        module(X).square().mean().backward()
        found[name] = [p.grad for p in module.parameters()]
    assert [g is None for g in found["fast"]] == [True, True, True, False, False, False]
    for one, other in zip(found["fast"], found["plain"], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
