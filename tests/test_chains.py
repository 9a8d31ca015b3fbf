"""Projectors as people write them, in nn.Sequential and in classes of linears: patched by their
structure, the same in every dtype, with less kept for backward; and what is left alone, and why."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import vlm_fast
from tests.cases import assert_right, every_dtype
from tests.chain_structures import (
    HIDDEN,
    STRUCTURES,
    WIDTH,
    FunctionalMlp,
    NamedMlp,
    PrismaticProjector,
    QuickGELU,
    SimpleResBlock,
    TimmMlp,
    mlp,
)
from tests.stirred_modules import gradients, stirred
from vlm_fast.modules import SequentialProjector
from vlm_fast.modules.activation import activation_of

every_structure = pytest.mark.parametrize("name", STRUCTURES)


def results(module, x):
    """The output and every gradient by name."""
    names = ["output", "input", *(name for name, _ in module.named_parameters())]
    return dict(zip(names, gradients(module, x), strict=True))


def saved_bytes(module, x):
    """Bytes that the graph of one call holds, parameters excluded."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x.clone().requires_grad_())
    assert y.requires_grad
    return sum(storages.values())


@every_dtype
@every_structure
def test_patched_is_the_same_module(name, dtype):
    make, shape, patched, _ = STRUCTURES[name]
    plain = stirred(make()).to(dtype)
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    report = vlm_fast.patch(fast, strict=True)
    assert report.patched.keys() == set(patched) and not report.skipped
    assert list(fast.state_dict()) == list(plain.state_dict())
    x = torch.randn(shape).to(dtype)
    with vlm_fast.strict():
        ours = results(fast, x)
    assert_right(ours, lambda: results(plain, x), results(exact, x.double()), "output")
    report.revert()
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]


@every_structure
def test_less_is_kept_for_backward(name):
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
def test_bytes_of_deep_projectors(saved, depth, most):
    """x and each pre-activation; of "input" no first one; of "all" as eager."""
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
def test_under_autocast_as_unpatched(name, dtype):
    make, shape, *_ = STRUCTURES[name]
    plain = stirred(make())
    fast, x = copy.deepcopy(plain), torch.randn(shape)
    vlm_fast.patch(fast)
    exact = results(copy.deepcopy(plain).double(), x.double())

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


def test_an_activation_that_autocast_leaves_in_fp32_is_computed_in_it():
    """Behind a norm that returns fp32 the activation is called: what comes after it is cast."""

    class Norm32(nn.LayerNorm):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    plain = stirred(nn.Sequential(nn.Linear(8, 24), Norm32(24), nn.GELU(), nn.Linear(24, 8)))
    fast, x = copy.deepcopy(plain), torch.randn(5, 8)
    vlm_fast.patch(fast)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(vlm_fast.VlmFastFallbackWarning, match=r"2: .* autocast"):
            ours = fast(x)
        assert torch.equal(ours, plain(x))


# ---- dropout ----


@pytest.mark.parametrize("make", [TimmMlp, FunctionalMlp], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_dropout_is_asked_at_each_call(make, training):
    plain = stirred(make(0.1)).train(not training)
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


def test_dropout_that_is_always_live():
    class Mlp(FunctionalMlp):
        def forward(self, x):
            return self.fc2(F.dropout(F.relu(self.fc1(x)), 0.4))

    module, x = Mlp().eval(), torch.randn(4, WIDTH)
    plain = copy.deepcopy(module)
    vlm_fast.patch(module)
    for m in (plain, module):
        torch.manual_seed(5)
        m.found = m(x)
    torch.testing.assert_close(module.found, plain.found)
    assert "drops values" in vlm_fast.explain(module)[""]


def test_norm_between_activation_and_linear():
    """timm's, of ConvNeXt's heads: nothing to fuse, and it says so."""
    report = vlm_fast.patch(nn.ModuleDict({"mlp": TimmMlp(norm_layer=nn.LayerNorm), "ok": mlp(2)}))
    assert report.patched.keys() == {"ok"}
    assert report.skipped == {
        "mlp": "GELU -> LayerNorm stands between its linears, not one activation"
    }


# ---- what a forward goes by ----


def test_what_the_forward_read_has_changed():
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


def test_a_function_that_became_another_or_a_module():
    for act in (F.relu, nn.Tanh()):
        plain = FunctionalMlp()
        fast, x = copy.deepcopy(plain), torch.randn(3, WIDTH)
        vlm_fast.patch(fast)
        for module in (plain, fast):
            del module.act
            module.act = act
        assert vlm_fast.explain(fast)[""] is not None
        torch.testing.assert_close(fast(x), plain(x))


def test_a_child_that_was_replaced_or_deleted():
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
    assert vlm_fast.stats(reset=True)["mlp"]["fast"] == 2  # its first two linears still are
    for module in (plain, fast):
        del module.fc3
    for module in (plain, fast):
        with pytest.raises(AttributeError, match="fc3"):
            module(x)


def test_a_forward_that_is_another_in_training():
    class Mlp(NamedMlp):
        def forward(self, x):
            x = self.activation_fn(self.fc1(x))
            return self.fc2(x) if self.training else self.activation_fn(self.fc2(x))

    report = vlm_fast.patch(nn.ModuleDict({"a": Mlp(nn.GELU()), "b": mlp(2)}))
    assert report.skipped == {"a": "its forward is another one in training"}


# ---- activations told by their code ----


class OtherSlope(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.7 * x)


class QuickGELUOfAnother(QuickGELU):
    def forward(self, x):
        return super().forward(x) + 1


class ScaledGELU(nn.GELU):
    def forward(self, x):
        return 2 * super().forward(x)


class QuickGELUOfItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = 1.702

    def forward(self, x):
        return x * (self.slope * x).sigmoid()


def test_which_activations_are_known():
    class FlippedQuickGelu(nn.Module):
        def forward(self, x):
            return (x * 1.702).sigmoid() * x

    assert activation_of(QuickGELU()) == activation_of(FlippedQuickGelu()) == "quick_gelu"
    for kind in (OtherSlope, QuickGELUOfAnother, ScaledGELU, QuickGELUOfItself):
        assert activation_of(kind()) is None
        module = NamedMlp(kind())
        with pytest.warns(UserWarning, match=f"its activation {kind.__name__} is not one the"):
            assert not vlm_fast.patch(module).patched


def test_a_quick_gelu_replaced_in_its_class(monkeypatch):
    module, x = NamedMlp(QuickGELU()), torch.randn(3, WIDTH)
    vlm_fast.patch(module)
    monkeypatch.setattr(QuickGELU, "forward", lambda self, x: x.abs())
    torch.testing.assert_close(module(x), module.fc2(module.fc1(x).abs()))


# ---- what is left alone, and why ----


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in "qkvo":
            setattr(self, f"{name}_proj", nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj((q @ k.mT).softmax(-1) @ v)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x * torch.sigmoid(self.b(self.act(self.a(x))))


class Residual(NamedMlp):
    def forward(self, x):
        return x + super().forward(x)


class Wide(NamedMlp):
    def forward(self, x, scale=1.0):
        return scale * super().forward(x)


NO_CHAIN = "its forward is not a chain of its children"
LEFT = {
    "attention": (Attention, NO_CHAIN),
    "gate": (Gate, NO_CHAIN),
    "residual": (lambda: Residual(nn.GELU()), NO_CHAIN),
    "arguments": (lambda: Wide(nn.GELU()), "its forward takes more than one argument"),
    "unknown activation": (
        lambda: mlp(2, act=nn.Softplus), "its activation Softplus is not one the kernels know"
    ),
    "no activation": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 4)),
        "no activation stands between its linears",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_candidates_that_are_left_are_named(name):
    make, why = LEFT[name]
    module = make()
    with pytest.warns(UserWarning, match="no connector of"):
        report = vlm_fast.patch(module)
    assert report.skipped == {"": why} and str(report) == f"skipped (the model): {why}"


def test_what_holds_fewer_than_two_linears_is_no_candidate():
    for module in (nn.Linear(3, 4), mlp(1), nn.Sequential(nn.Linear(3, 4), nn.GELU())):
        with pytest.warns(UserWarning, match="no connector of"):
            assert str(vlm_fast.patch(module)) == "nothing to patch"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp, self.odd = Attention(), NamedMlp(QuickGELU()), Gate()

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.odd(self.mlp(x))


class VisionLanguage(nn.Module):
    """A tower, a projector, an odd head, and a language model whose blocks are a Sequential."""

    def __init__(self, layers=4):
        super().__init__()
        self.tower = nn.ModuleList(Block() for _ in range(layers))
        self.mm_projector = mlp(2, hidden=WIDTH)
        self.head = Residual(nn.GELU())
        self.language = nn.Sequential(*(mlp(2, hidden=WIDTH) for _ in range(layers)))

    def forward(self, x):
        for block in self.tower:
            x = block(x)
        return self.language(self.head(self.mm_projector(x)))


@pytest.mark.parametrize("layers", [3, 4])
def test_towers_are_left_alone_and_not_listed(layers):
    model = VisionLanguage(layers)
    report = vlm_fast.patch(model)
    assert report.patched.keys() == {"mm_projector"} and report.skipped == {"head": NO_CHAIN}


def test_a_block_of_a_short_tower_is_left_alone_too():
    model = VisionLanguage(1)
    assert vlm_fast.patch(model).patched.keys() == {"mm_projector", "language.0"}


def test_towers_are_patched_on_request():
    plain = stirred(VisionLanguage())
    fast, x = copy.deepcopy(plain), torch.randn(2, 5, WIDTH)
    report = vlm_fast.patch(fast, towers=True)
    of_tower = {f"tower.{i}.mlp" for i in range(4)} | {f"language.{i}" for i in range(4)}
    assert report.patched.keys() == of_tower | {"mm_projector"}
    assert report.skipped.keys() == {
        "head", *(f"tower.{i}.{name}" for i in range(4) for name in ("attention", "odd"))
    }  # fmt: skip
    with vlm_fast.strict():
        for ours, theirs in zip(gradients(fast, x), gradients(plain, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_residual_block_is_named_where_its_linears_are_its_own_children():
    report = vlm_fast.patch(nn.Sequential(SimpleResBlock(8)))
    assert report.patched.keys() == {"0.proj"} and not report.skipped


@pytest.mark.parametrize("kind", ["merger", "block"])
def test_chains_inside_a_patched_connector_are_its_own(kind):
    """Qwen's merger and Flamingo's block read the children of theirs."""
    if kind == "merger":
        from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

        module, inner = PatchMerger(dim=16, context_dim=12), "mlp"
    else:
        from tests.plain_flamingo import GatedCrossAttentionBlock

        module, inner = GatedCrossAttentionBlock(dim=24, dim_visual=12, dim_head=8, heads=2), "ff"
    for _ in range(2):
        report = vlm_fast.patch(module)
        assert report.patched.keys() <= {""} and not report.skipped
        assert type(module.get_submodule(inner)) is nn.Sequential


def test_own_modules_are_no_candidates():
    from vlm_fast.modules import MLPProjector, PatchMerger

    model = nn.ModuleList([MLPProjector(4, 4), PatchMerger(4, 8, keys="qwen2")])
    model.append(SequentialProjector(4, 4))
    with pytest.warns(UserWarning, match="no connector of"):
        assert str(vlm_fast.patch(model)) == "nothing to patch"
