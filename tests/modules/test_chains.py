"""Projectors in nn.Sequential and in small classes: patched by structure, equal to unpatched in
every dtype, and with fewer bytes saved for backward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlm_fast
from tests.support.cases import every_dtype
from tests.support.chain_structures import (
    HIDDEN,
    STRUCTURES,
    WIDTH,
    FunctionalMlp,
    NamedMlp,
    PrismaticProjector,
    TimmMlp,
    mlp,
)
from tests.support.randomised_modules import (
    assert_as_accurate,
    gradients,
    in_double,
    randomised,
    results,
)
from vlm_fast.devtools import memory
from vlm_fast.modules import SequentialProjector

every_structure = pytest.mark.parametrize("name", STRUCTURES)


def saved_bytes(module, x):
    """Bytes that autograd saves for one call, without parameters and the result."""
    return memory.saved_bytes(lambda: module(x.clone().requires_grad_()), module.parameters())


@every_dtype
@every_structure
def test_patched_matches_unpatched(name, dtype):
    make, shape, patched, _ = STRUCTURES[name]
    plain = randomised(make()).to(dtype)
    fast = copy.deepcopy(plain)
    report = vlm_fast.patch(fast, strict=True)
    assert report.patched.keys() == set(patched) and not report.skipped
    assert list(fast.state_dict()) == list(plain.state_dict())
    x = torch.randn(shape).to(dtype)
    with vlm_fast.strict():
        assert_as_accurate(fast, plain, x)
    report.revert()
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]


@every_structure
def test_patched_saves_fewer_bytes(name):
    make, shape, _, less = STRUCTURES[name]
    module, x = make(), torch.randn(shape)
    before = saved_bytes(module, x)
    vlm_fast.patch(module)
    after = saved_bytes(module, x)
    assert after < before if less else after <= before


@pytest.mark.parametrize(
    "saved, depth, most",
    [("preactivation", 3, 0.55), ("preactivation", 5, 0.55), ("input", 3, 0.3), ("all", 3, 1.0)],
)
def test_saved_bytes_of_deep_projectors(saved, depth, most):
    """ "all" saves as much as eager, the default x and pre-activations, "input" one fewer."""
    plain, x = mlp(depth, 64, 256), torch.randn(2, 64, 64)
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast, saved=saved)
    assert saved_bytes(fast, x) <= most * saved_bytes(plain, x)
    own = SequentialProjector(64, 256, depth=depth, saved=saved)
    assert saved_bytes(own, x) == saved_bytes(fast, x)
    with vlm_fast.strict():
        for ours, theirs in zip(gradients(fast, x), gradients(plain, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["LLaVA mlp3x", "Prismatic, two backbones", "functional"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_matches_unpatched(name, dtype):
    make, shape, *_ = STRUCTURES[name]
    plain = randomised(make())
    fast, x = copy.deepcopy(plain), torch.randn(shape)
    vlm_fast.patch(fast)
    exact = results(*in_double(plain, x))

    def run(module):
        with torch.autocast("cpu", dtype):
            return results(module, x)

    with vlm_fast.strict():
        ours = run(fast)
    theirs = run(plain)
    assert ours["output"].dtype is theirs["output"].dtype is dtype
    for what, one in ours.items():
        assert one.dtype is theirs[what].dtype
        errors = [(t.double() - exact[what]).norm() for t in (one, theirs[what])]
        assert errors[0] <= 1.25 * errors[1], what


def test_activation_after_fp32_norm_runs_in_fp32_under_autocast():
    """After a norm that returns fp32 the activation runs in fp32, and the next linear casts."""

    class Norm32(nn.LayerNorm):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    plain = randomised(nn.Sequential(nn.Linear(8, 24), Norm32(24), nn.GELU(), nn.Linear(24, 8)))
    fast, x = copy.deepcopy(plain), torch.randn(5, 8)
    vlm_fast.patch(fast)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(vlm_fast.VlmFastFallbackWarning, match=r"2: .* autocast"):
            ours = fast(x)
        assert torch.equal(ours, plain(x))


# ---- dropout ----


@pytest.mark.parametrize("make", [TimmMlp, FunctionalMlp], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_active_dropout_is_checked_at_each_call(make, training):
    plain = randomised(make(0.1)).train(not training)
    fast, x = copy.deepcopy(plain), torch.randn(2, 9, WIDTH)
    vlm_fast.patch(fast, strict=True)  # in the other mode
    for module in (plain, fast):
        module.train(training)
    if training:
        assert vlm_fast.explain(fast)[""] in (
            "drop1: it drops values (p=0.1)", "dropout: it drops values (p=0.1)"
        )  # fmt: skip
        with vlm_fast.strict(), pytest.raises(vlm_fast.VlmFastFallbackError, match="drops values"):
            fast(x)
    else:
        with vlm_fast.strict():
            fast(x)
    found = []
    for module in (plain, fast):
        torch.manual_seed(3)
        found.append(results(module, x))
    vlm_fast.stats(reset=True)
    for what, ours in found[1].items():
        torch.testing.assert_close(ours, found[0][what], rtol=1e-4, atol=1e-5)


def test_dropout_active_in_eval_mode():
    class Mlp(FunctionalMlp):
        def forward(self, x):
            x = self.fc2(F.dropout(F.relu(self.fc1(x)), 0.4))
            return self.out(torch.relu(x))

    module, x = Mlp().eval(), torch.randn(4, WIDTH)
    plain = copy.deepcopy(module)
    vlm_fast.patch(module)
    for m in (plain, module):
        torch.manual_seed(5)
        m.found = m(x)
    torch.testing.assert_close(module.found, plain.found)
    assert "drops values" in vlm_fast.explain(module)[""]


# ---- attributes that a forward reads ----


def test_changed_attribute_falls_back():
    plain = PrismaticProjector(True)
    fast, x = copy.deepcopy(plain), torch.randn(3, WIDTH)
    vlm_fast.patch(fast)
    for module in (plain, fast):
        module.use_fused_vision_backbone = False
    assert vlm_fast.explain(fast)[""] == (
        "use_fused_vision_backbone is another than when it was patched"
    )
    with pytest.warns(vlm_fast.VlmFastFallbackWarning, match="use_fused_vision_backbone"):
        torch.testing.assert_close(fast(x), plain(x))


def test_replaced_activation_function_falls_back():
    for act in (F.relu, nn.Tanh()):
        plain = FunctionalMlp()
        fast, x = copy.deepcopy(plain), torch.randn(3, WIDTH)
        vlm_fast.patch(fast)
        for module in (plain, fast):
            del module.act
            module.act = act
        assert vlm_fast.explain(fast)[""] is not None
        torch.testing.assert_close(fast(x), plain(x))


def test_replaced_or_deleted_child_falls_back():
    plain = PrismaticProjector(True)
    fast, x = copy.deepcopy(plain), torch.randn(3, WIDTH)
    vlm_fast.patch(fast)
    other = nn.Linear(HIDDEN, 5)
    for module in (plain, fast):
        module.fc3 = other
    with vlm_fast.strict():
        torch.testing.assert_close(fast(x), plain(x))
    for module in (plain, fast):
        module.act_fn2 = nn.Tanh()
    torch.testing.assert_close(fast(x), plain(x))
    assert vlm_fast.stats(reset=True)["mlp"]["fast"] == 2  # its first two linears are still fused
    for module in (plain, fast):
        del module.fc3
    for module in (plain, fast):
        with pytest.raises(AttributeError, match="fc3"):
            module(x)


def test_forward_that_differs_in_training_is_skipped():
    class Mlp(NamedMlp):
        def forward(self, x):
            x = self.activation_fn(self.fc1(x))
            return self.fc2(x) if self.training else self.activation_fn(self.fc2(x))

    report = vlm_fast.patch(nn.ModuleDict({"a": Mlp(nn.GELU()), "b": mlp(2)}))
    assert report.skipped == {"a": "its forward is another one in training"}
