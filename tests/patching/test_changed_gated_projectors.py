"""A gated projector that changes after its first calls is seen, although it remembers its calls."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.aya_vision.modeling_aya_vision import AyaVisionMultiModalProjector

import vlm_fast

pytestmark = pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")
SIZES = SimpleNamespace(
    vision_config=SimpleNamespace(hidden_size=24), text_config=SimpleNamespace(hidden_size=32),
    downsample_factor=2, alignment_intermediate_size=80, adapter_layer_norm_eps=1e-6,
)  # fmt: skip
X = torch.linspace(-1, 1, 2 * 36 * 24).sin().view(2, 36, 24)


class Shifted(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 1


def doubled(module, args, result):
    return result * 2


CHANGES = {
    "hook of linear_1": lambda m: m.linear_1.register_forward_hook(doubled),
    "hook of linear_2": lambda m: m.linear_2.register_forward_hook(doubled),
    "known activation": lambda m: setattr(m, "act", nn.GELU()),
    "unknown activation": lambda m: setattr(m, "act", nn.Softplus()),
    "linear_2 wrapped": lambda m: setattr(m, "linear_2", Shifted(m.linear_2)),
    "parameter replaced": lambda m: setattr(m.linear_1, "weight", nn.Parameter(torch.ones(80, 96))),
    "data replaced": lambda m: setattr(m.linear_2.weight, "data", torch.ones(32, 40)),
    "eps": lambda m: setattr(m.layernorm, "eps", 0.5),
    "half": lambda m: m.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change):
    torch.manual_seed(0)
    plain = AyaVisionMultiModalProjector(SIZES)
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast, strict=True)
    for _ in range(3):
        torch.testing.assert_close(fast(X), plain(X))
    before = fast(X)
    for module in (plain, fast):
        change(module)
    for size in (36, 64, 64, 36):
        x = X.flatten()[: 2 * 24].view(2, 1, 24).expand(-1, size, -1).clone()
        x[:, ::3] = X[:, :1] + 0.25
        x = x.to(next(plain.parameters()).dtype)
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-4)
    after = fast(X.to(next(plain.parameters()).dtype))
    assert not torch.equal(after.to(before.dtype), before)


def test_a_grid_that_is_no_square_raises_as_before():
    plain = AyaVisionMultiModalProjector(SIZES)
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast, strict=True)
    fast(X)
    for module in (plain, fast):
        with pytest.raises(RuntimeError, match="shape"):
            module(X[:, :35])


def test_gradients_of_the_first_and_of_a_remembered_call():
    plain = AyaVisionMultiModalProjector(SIZES)
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast, strict=True)
    for _ in range(2):
        for module in (plain, fast):
            module.zero_grad()
            module(X).square().sum().backward()
        for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
