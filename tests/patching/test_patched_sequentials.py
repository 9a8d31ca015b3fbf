"""A patched nn.Sequential can be edited, sliced, copied and wrapped like a plain one.

Each test does the same to a plain and a patched one and compares them.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import vlm_fast
from tests.support.chain_structures import HIDDEN, WIDTH, FunctionalMlp, SimpleResBlock, mlp
from tests.support.copies import COPIES
from tests.support.randomised_modules import randomised
from tests.support.sequential_pairs import X, assert_alike, every_pair, pair
from vlm_fast.modules import SequentialProjector

# The first call of a (module, reason) warns; every one is counted.
pytestmark = pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")


def test_patched_sequential_keeps_type_keys_and_signature():
    plain, fast = pair()
    assert isinstance(fast, nn.Sequential) and len(fast) == 3
    assert [*map(type, fast)] == [nn.Linear, nn.GELU, nn.Linear]
    assert fast[0].weight.device.type == "cpu" and fast[-1] is fast[2]
    assert list(fast.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert (type(fast).__name__, type(fast).__module__) == ("Sequential", nn.Sequential.__module__)
    assert "Sequential[vlm_fast]" in repr(fast)
    x = X.clone()
    with vlm_fast.strict():
        torch.testing.assert_close(fast(input=x), plain(input=x))
    for wrong in (lambda m: m(), lambda m: m(x, x), lambda m: m(x=x)):
        with pytest.raises(TypeError):
            wrong(fast)


@every_pair
def test_training_steps_and_state_dict_loading(make):
    plain, fast = make(3)
    for _ in range(2):
        for module in (plain, fast):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
            optimizer.zero_grad()
            module(X).square().mean().backward()
            optimizer.step()
    assert_alike(fast, plain, fused=True)
    weight = torch.randn_like(plain[0].weight) * 0.1
    for module in (plain, fast):
        module.load_state_dict({"0.weight": weight}, strict=False)
    assert_alike(fast, plain, fused=True)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(depth=0), "depth is 0, expected at least 1"),
        (dict(saved="some"), "saved is 'some', expected one of"),
        (dict(activation="softplus"), "activation is 'softplus', expected one of"),
    ],
)
def test_invalid_options_raise(options, said):
    with pytest.raises(ValueError, match=said):
        SequentialProjector(3, 4, **options)


# ---- slices and edits ----

PARTS = {
    "m[:2]": lambda m: m[:2],
    "m[:3]": lambda m: m[:3],
    "m[1:]": lambda m: m[1:],
    "m[2:]": lambda m: m[2:],
    "m[::2]": lambda m: m[::2],
    "m + m[1:]": lambda m: m + m[1:],
}


@every_pair
@pytest.mark.parametrize("part", PARTS)
def test_slices_and_sums_match_plain(make, part):
    plain, fast = (PARTS[part](m) for m in make(3))
    x = torch.randn(3, plain[0].in_features if isinstance(plain[0], nn.Linear) else HIDDEN)
    calls, _ = assert_alike(fast, plain, x)
    if make is pair and part != "m + m[1:]":
        assert type(fast).__name__ == "Sequential"
        expected = {
            "m[:3]": {"mlp": 1}, "m[1:]": {"act_linear": 2}, "m[2:]": {"mlp": 1},
        }  # fmt: skip
        assert calls == expected.get(part, {})


def append(m):
    m.append(nn.GELU())
    m.append(nn.Linear(HIDDEN, 4))


def insert(m):
    m.insert(0, nn.LayerNorm(WIDTH))


def relu(m):
    m[1] = nn.ReLU()


def delete(m):
    del m[2]


def delete_activation(m):
    del m[1]


def tanh(m):
    m[1] = nn.Tanh()


def double(m):
    m[0] = nn.Linear(WIDTH, HIDDEN, dtype=torch.float32)
    torch.nn.init.constant_(m[0].weight, 0.1)
    torch.nn.init.zeros_(m[0].bias)


def residual(m):
    torch.manual_seed(4)
    m.append(SimpleResBlock(HIDDEN))


EDITS = {
    append: {"mlp": 1, "act_linear": 1}, insert: {"norm_mlp": 1}, relu: {"mlp": 1},
    double: {"mlp": 1}, delete: {}, delete_activation: {}, tanh: {}, residual: {"mlp": 1},
}  # fmt: skip


@every_pair
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_in_place_edits_match_plain(make, edit):
    plain, fast = make()
    fast(X)  # nothing is cached from before the edit
    for module in (plain, fast):
        torch.manual_seed(2)
        edit(module)
    calls, fallbacks = assert_alike(fast, plain)
    assert calls == EDITS[edit]
    said = {
        tanh: "its activation Tanh is not one the kernels know",
        delete_activation: "no activation stands between its linears",
    }.get(edit)
    assert fallbacks == ([] if said is None else [said])
    if make is pair:
        assert vlm_fast.explain(fast)[""] == said


# ---- copies ----


@every_pair
@pytest.mark.parametrize("clone", COPIES)
def test_copies_match_plain(make, clone):
    plain, fast = make(3)
    fast(X)
    twin = clone(fast)
    assert type(twin) is type(fast)
    assert_alike(twin, plain, fused=True)
    for module in (plain, twin):
        relu(module)
        with torch.no_grad():
            module[0].weight.mul_(2)
    assert_alike(twin, plain, fused=True)
    assert not torch.allclose(twin(X), fast(X))
    twin.double()
    torch.testing.assert_close(twin(X.double()), plain.double()(X.double()))
    if make is pair:
        assert vlm_fast.unpatch(twin) == 1 and type(twin) is nn.Sequential


def test_copies_of_an_mlp_class():
    """Its patch recipe refers to functions."""
    module = FunctionalMlp()
    vlm_fast.patch(module, strict=True)
    for clone in (copy.copy, *COPIES):
        twin = clone(module)
        assert type(twin) is type(module)
        with vlm_fast.strict():
            torch.testing.assert_close(twin(X), module(X))
        assert vlm_fast.unpatch(twin) == 1 and type(twin) is FunctionalMlp


# ---- wrapped children ----


def lora(m):
    peft = pytest.importorskip("peft")
    torch.manual_seed(6)
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, m)


def hook(m):
    m[2].register_forward_hook(lambda module, args, y: y * 2)


def hook_of_identity(m):
    m.insert(1, nn.Identity())
    m[1].register_forward_hook(lambda module, args, y: y * 2)


def frozen(m):
    m[0].requires_grad_(False)


WRAPS = {
    lora: ("0: peft.tuners.lora", {"act_linear": 1}),
    hook: ("2: it has hooks", {"act_linear": 1}),
    hook_of_identity: ("1: it has hooks", {"act_linear": 1}),
}


@every_pair
@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
def test_wrapped_child_is_called_and_the_rest_is_fused(make, wrap):
    plain, fast = make(3)
    for module in (plain, fast):
        wrap(module)
    for module in (plain, fast):
        module.requires_grad_()
    calls, (reason,) = assert_alike(fast, plain, fused=False)
    said, fused = WRAPS[wrap]
    assert said in reason and calls == fused
    with vlm_fast.strict(), pytest.raises(vlm_fast.VlmFastFallbackError, match=said):
        fast(X)


def test_lora_before_the_patch():
    plain = randomised(mlp(3, WIDTH, HIDDEN))
    lora(plain)
    plain.requires_grad_()
    fast = copy.deepcopy(plain)
    assert vlm_fast.patch(fast).patched == {"": "Sequential by FusedMLP"}
    assert_alike(fast, plain, fused=False)


@every_pair
def test_frozen_linears(make):
    plain, fast = make(3)
    for module in (plain, fast):
        frozen(module)
    ours, theirs = (m(X) for m in (fast, plain))
    torch.testing.assert_close(ours, theirs)
    for y in (ours, theirs):
        y.square().sum().backward()
    for one, other in zip(fast.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@every_pair
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_sequential(make, reentrant):
    plain, fast = make(3)

    def run(module):
        return lambda x: checkpoint_sequential(module, 2, x, use_reentrant=reentrant)

    for module in (plain, fast):
        x = X.clone().requires_grad_()
        run(module)(x).square().sum().backward()
        module.found = [x.grad, *(p.grad for p in module.parameters())]
    for one, other in zip(fast.found, plain.found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
