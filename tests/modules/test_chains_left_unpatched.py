"""Modules of linears that are not patched, with their reasons: no chains, towers, connectors."""

import copy
import functools

import pytest
import torch
from torch import nn

import vlm_fast
from tests.support.chain_structures import (
    HIDDEN,
    WIDTH,
    NamedMlp,
    QuickGELU,
    SimpleResBlock,
    TimmMlp,
    mlp,
)
from tests.support.randomised_modules import gradients, randomised
from vlm_fast.modules import SequentialProjector
from vlm_fast.modules.parameter_access.activation import activation_name

# ---- activations recognised by their code ----


class OtherSlope(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.7 * x)


class QuickGELUOfAnother(QuickGELU):
    def forward(self, x):
        return super().forward(x) + 1


class ScaledGELU(nn.GELU):
    def forward(self, x):
        return 2 * super().forward(x)


class CalledGELU(nn.GELU):
    def __call__(self, x):
        return 2 * super().__call__(x)


class CalledQuickGELU(QuickGELU):
    def __call__(self, x):
        return 2 * super().__call__(x)


class QuickGELUOfItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = 1.702

    def forward(self, x):
        return x * (self.slope * x).sigmoid()


def test_known_activations():
    class FlippedQuickGelu(nn.Module):
        def forward(self, x):
            return (x * 1.702).sigmoid() * x

    assert activation_name(QuickGELU()) == activation_name(FlippedQuickGelu()) == "quick_gelu"
    written = (OtherSlope, QuickGELUOfAnother, ScaledGELU, QuickGELUOfItself)
    for kind in (*written, CalledGELU, CalledQuickGELU):
        assert activation_name(kind()) is None
        unknown = f"its activation {kind.__name__} is not one the kernels know"
        with pytest.warns(UserWarning, match="no connector of"):
            skipped = vlm_fast.patch(NamedMlp(kind())).skipped
        assert skipped == {"": unknown if kind in written else NO_CHAIN}
        with pytest.warns(UserWarning, match=unknown):
            vlm_fast.patch(mlp(2, act=kind))


def test_replaced_quick_gelu_forward_runs(monkeypatch):
    module, x = NamedMlp(QuickGELU()), torch.randn(3, WIDTH)
    vlm_fast.patch(module)
    monkeypatch.setattr(QuickGELU, "forward", lambda self, x: x.abs())
    torch.testing.assert_close(module(x), module.fc2(module.fc1(x).abs()))


# ---- skipped modules and reasons ----


def test_norm_between_activation_and_linear():
    """timm's MLP in ConvNeXt heads is skipped with a reason."""
    report = vlm_fast.patch(nn.ModuleDict({"mlp": TimmMlp(norm_layer=nn.LayerNorm), "ok": mlp(2)}))
    assert report.patched.keys() == {"ok"}
    assert report.skipped == {
        "mlp": "GELU -> LayerNorm stands between its linears, not one activation"
    }


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


class Optional(TimmMlp):
    def forward(self, x):
        x = self.act(self.fc1(x))
        return self.fc2(x if isinstance(self.norm, nn.Identity) else self.norm(x))


class WithoutGradients(NamedMlp):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class WithoutAutocast(NamedMlp):
    def forward(self, x):
        x = self.activation_fn(self.fc1(x))
        with torch.autocast("cpu", enabled=False):
            return self.fc2(x)


class WithAutocast(NamedMlp):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


MODES = "its forward switches gradients or autocast"
NO_CHAIN = "its forward is not a chain of its children"
LEFT = {
    "attention": (Attention, NO_CHAIN),
    "gate": (Gate, NO_CHAIN),
    "residual": (lambda: Residual(nn.GELU()), NO_CHAIN),
    "arguments": (lambda: Wide(nn.GELU()), "its forward takes more than one argument"),
    "no gradients": (lambda: WithoutGradients(nn.GELU()), MODES),
    "no autocast": (lambda: WithoutAutocast(nn.GELU()), MODES),
    "autocast": (lambda: WithAutocast(nn.GELU()), MODES),
    "an unused child": (Optional, "its forward leaves out drop1"),
    "unknown activation": (
        lambda: mlp(2, act=nn.Softplus), "its activation Softplus is not one the kernels know"
    ),
    "no activation": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 4)),
        "no activation stands between its linears",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_skipped_candidates_have_reasons(name):
    make, why = LEFT[name]
    module = make()
    with pytest.warns(UserWarning, match="no connector of"):
        report = vlm_fast.patch(module)
    assert report.skipped == {"": why} and str(report) == f"skipped (the model): {why}"


def test_wrapped_forward_of_linears_is_skipped(monkeypatch):
    """A wrapper may treat tensors and symbolic values differently, so it is not traced."""
    forward = NamedMlp.forward

    @functools.wraps(forward)
    def mine(self, hidden_states):
        y = forward(self, hidden_states)
        return 2 * y if isinstance(y, torch.Tensor) else y

    monkeypatch.setattr(NamedMlp, "forward", mine)
    with pytest.warns(UserWarning, match=r"NamedMlp\.forward has been replaced"):
        vlm_fast.patch(NamedMlp(nn.GELU()))


def test_non_tensor_input_runs_the_original_forward():
    class Mlp(NamedMlp):
        def forward(self, x):
            if isinstance(x, tuple):
                x = x[0]
            return self.fc2(self.activation_fn(self.fc1(x)))

    plain, x = Mlp(nn.GELU()), torch.randn(3, WIDTH)
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast)
    with pytest.warns(vlm_fast.VlmFastFallbackWarning, match="its input is a tuple"):
        torch.testing.assert_close(fast((x,)), plain(x))
    with vlm_fast.strict():
        torch.testing.assert_close(fast(x), plain(x))


def test_train_and_eval_modes_are_unchanged():
    with torch.no_grad(), torch.autocast("cpu"):
        vlm_fast.patch(NamedMlp(nn.GELU()))
        assert torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_modules_with_fewer_than_two_linears_are_no_candidates():
    parts = [nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)]
    few = nn.Sequential(nn.Linear(3, 4), nn.GELU())
    for module in (nn.Linear(3, 4), mlp(1), few, nn.ModuleList(parts)):
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
    """A tower, a projector, an unusual head, and a language model with a Sequential of blocks."""

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
def test_towers_are_not_patched_and_not_listed(layers):
    model = VisionLanguage(layers)
    report = vlm_fast.patch(model)
    assert report.patched.keys() == {"mm_projector"} and report.skipped == {"head": NO_CHAIN}


def test_block_of_a_short_tower_is_not_patched():
    model = VisionLanguage(1)
    assert vlm_fast.patch(model).patched.keys() == {"mm_projector", "language.0"}


class FlatBlock(nn.Module):
    """A block as in Whisper: the linears of its MLP are direct children."""

    def __init__(self):
        super().__init__()
        self.attention, self.fc1, self.fc2 = Attention(), nn.Linear(4, 4), nn.Linear(4, 4)


def test_module_lists_that_are_not_towers_are_patched():
    """A projector with residual blocks in a list, and a whole model in a list."""
    res = nn.Sequential(*mlp(2), SimpleResBlock(HIDDEN))
    whole = nn.Module()
    whole.tower, whole.mm_projector = nn.ModuleList([FlatBlock()]), mlp(2)
    report = vlm_fast.patch(nn.ModuleList([res, whole]))
    assert report.patched.keys() == {"0", "0.3.proj", "1.mm_projector"} and not report.skipped


def test_towers_are_patched_on_request():
    plain = randomised(VisionLanguage())
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


def test_linears_inside_a_residual_block_are_patched():
    report = vlm_fast.patch(nn.Sequential(SimpleResBlock(8)))
    assert report.patched.keys() == {"0.proj"} and not report.skipped


@pytest.mark.parametrize("kind", ["merger", "block"])
def test_chains_inside_a_patched_connector_are_not_patched_again(kind):
    """Qwen's merger and Flamingo's block read the parameters of their inner chain themselves."""
    if kind == "merger":
        from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

        module, inner = PatchMerger(dim=16, context_dim=12), "mlp"
    else:
        from tests.support.reference_flamingo import GatedCrossAttentionBlock

        module, inner = GatedCrossAttentionBlock(dim=24, dim_visual=12, dim_head=8, heads=2), "ff"
    for _ in range(2):
        report = vlm_fast.patch(module)
        assert report.patched.keys() <= {""} and not report.skipped
        assert type(module.get_submodule(inner)) is nn.Sequential


def test_own_modules_are_not_patched():
    from vlm_fast.modules import MLPProjector, PatchMerger

    model = nn.ModuleList([MLPProjector(4, 4), PatchMerger(4, 8, keys="qwen2")])
    model.append(SequentialProjector(4, 4))
    with pytest.warns(UserWarning, match="no connector of"):
        assert str(vlm_fast.patch(model)) == "nothing to patch"
