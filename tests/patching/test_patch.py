"""`vlm_fast.patch`: recognition by structure, copies, files, revert and errors."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

import vlm_fast
from tests.support import tiny_flamingos
from tests.support.tiny_llava import llava
from vlm_fast.modules import MLPProjector
from vlm_fast.modules.parameter_access.chain import find_chain


class Projector(nn.Module):
    """A projector with a known structure in an unknown class."""

    def __init__(self, act=None):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(12, 20), nn.Linear(20, 8)
        self.gelu = act or nn.GELU()

    def forward(self, x):
        return self.linear_2(self.gelu(self.linear_1(x)))


class Residual(Projector):
    def forward(self, x):
        return x[..., :8] + super().forward(x)


class Normed(Projector):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(12)

    def forward(self, x, scale=None):
        y = super().forward(self.norm(x))
        return y if scale is None else y * scale


def test_modules_are_found_by_structure():
    model = nn.ModuleDict({"a": Projector(), "b": Residual(), "c": Projector(nn.Softplus())})
    report = vlm_fast.patch(model)
    assert report.patched == {"a": "Projector by FusedMLP"}
    assert report.skipped == {
        "b": "its forward is not a chain of its children",
        "c": "its activation Softplus is not one the kernels know",
    }
    assert "skipped b: its forward" in str(report)


@pytest.mark.parametrize("family", ["idefics", "mllama"])
def test_missing_attribute_is_reported_with_transformers_version(family):
    """A layer without a needed attribute is skipped; the others are patched."""
    import transformers

    model = getattr(tiny_flamingos, family)()
    layers = [m for m in model.modules() if hasattr(m, "cross_attn")]
    layers[0].mlp.activation = layers[0].mlp.act_fn
    del layers[0].mlp.act_fn
    report = vlm_fast.patch(model)
    (why,) = report.skipped.values()
    assert f"{type(layers[0]).__name__} of transformers {transformers.__version__}" in why
    assert "no attribute 'act_fn'" in why and len(report.patched) >= 2
    with pytest.raises(ValueError, match=rf"(?s)no connector.*{transformers.__version__}"):
        vlm_fast.patch(layers[0], strict=True)


def test_norm_first_and_additional_arguments():
    # With a second argument the forward is not a chain.
    assert find_chain(Normed()) == ("its forward takes more than one argument")

    class OneArgument(Normed):
        def forward(self, x):
            return Projector.forward(self, self.norm(x))

    module = OneArgument()
    x = torch.randn(5, 12)
    expected = module(x)
    vlm_fast.patch(module)
    with vlm_fast.strict():
        torch.testing.assert_close(module(x), expected)
        torch.testing.assert_close(module(x=x), expected)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        module(x, scale=2)


NAMES = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu")
ACTIVATIONS = [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.ReLU()]


@pytest.mark.parametrize("act", [*ACTIVATIONS, *(ACT2FN[name] for name in NAMES)], ids=repr)
def test_all_activations_match_unpatched(act):
    module, x = Projector(act), torch.randn(5, 12)
    expected = module(x)
    vlm_fast.patch(module)
    with vlm_fast.strict():
        torch.testing.assert_close(module(x), expected)


def test_parameters_names_and_keys_are_unchanged():
    model = llava()
    before = list(model.state_dict())
    parameters = dict(model.named_parameters())
    projector = type(model.model.multi_modal_projector)
    vlm_fast.patch(model)
    now = type(model.model.multi_modal_projector)
    assert list(model.state_dict()) == before
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert issubclass(now, projector)
    assert (now.__name__, now.__module__, now.__qualname__) == (
        projector.__name__, projector.__module__, projector.__qualname__,
    )  # fmt: skip
    assert "LlavaMultiModalProjector[vlm_fast]" in repr(model)


def test_unpatching_one_model_leaves_others_patched():
    first, second = llava(), llava()
    report = vlm_fast.patch(first)
    vlm_fast.patch(second, saved="input")
    assert second.model.multi_modal_projector.patch_spec.settings.saved == "input"
    assert first.model.multi_modal_projector.patch_spec.settings.saved == "preactivation"
    report.revert()
    assert vlm_fast.explain(first) == {} and len(vlm_fast.explain(second)) == 2


def test_invalid_arguments_raise_and_change_nothing():
    model = llava()
    with pytest.raises(TypeError, match="unexpected keyword argument 'save'"):
        vlm_fast.patch(model, save="input")
    with pytest.raises(ValueError, match="saved is 'some', expected one of"):
        vlm_fast.patch(model, saved="some")
    with pytest.raises(TypeError, match=r"model is a type, expected a torch\.nn\.Module"):
        vlm_fast.patch(type(model))
    assert vlm_fast.explain(model) == {}


def test_zero3_parameters_raise_and_change_nothing():
    model = llava()
    model.model.multi_modal_projector.linear_2.weight.ds_id = 4
    with pytest.raises(
        ValueError, match=r"linear_2\.weight partitioned by ZeRO-3.*patch the model"
    ):
        vlm_fast.patch(model)
    assert vlm_fast.explain(model) == {}


def test_zero_images_give_zero_gradients_to_all_parameters():
    module = Projector()
    vlm_fast.patch(module)
    with vlm_fast.strict():
        y = module(torch.randn(0, 16, 12))
    assert y.shape == (0, 16, 8)
    for gradient in torch.autograd.grad(y.sum(), [*module.parameters()]):
        assert gradient is not None and not gradient.any()


def test_from_module_shares_parameters():
    source = llava().model.multi_modal_projector
    projector = MLPProjector.from_module(source, saved="input")
    assert projector.linear_1 is source.linear_1 and "saved='input'" in repr(projector)
    x = torch.randn(2, 3, 48)
    with vlm_fast.strict():
        torch.testing.assert_close(projector(x), source(x))
    with pytest.raises(ValueError, match="module is a Residual: its forward is not a chain"):
        MLPProjector.from_module(Residual())
    with pytest.raises(ValueError, match="activation is 'softplus'"):
        MLPProjector(8, 8, activation="softplus")
