"""Tests of `add_layer_norm` beyond those that every op has."""

from __future__ import annotations

import pytest
import torch

from tests.support.op_accuracy import assert_accurate
from vlm_fast.kernels import add_layer_norm as kernels
from vlm_fast.ops.declaration import OPS

pytestmark = pytest.mark.devices("cpu", "interpreter", "cuda")

ADD_LAYER_NORM = OPS["add_layer_norm"]
FP32 = torch.float32


def arguments(device, *, x, residual, parameters, x_bias, shape=(2, 5, 72)):
    """Random arguments of `add_layer_norm` with the given dtypes."""
    features = shape[-1]
    return (
        torch.randn(shape, device=device).to(x),
        torch.randn(shape, device=device).to(residual),
        1 + torch.randn(features, device=device).to(parameters) / 8,
        torch.randn(features, device=device).to(parameters) / 8,
        torch.randn(features, device=device).to(x_bias),
        torch.tensor(20260103, device=device),
    )


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_bias", ["half", "fp32"])
@pytest.mark.parametrize("residual", ["half", "fp32"])
def test_parameters_and_residual_in_fp32(device, residual, x_bias, half, dropout):
    """The result has the residual's dtype, as under autocast."""
    dtypes = {"half": half, "fp32": FP32}
    args = arguments(
        device, x=half, residual=dtypes[residual], parameters=FP32, x_bias=dtypes[x_bias]
    )
    assert_accurate(ADD_LAYER_NORM, args, {"dropout": dropout}, layout="padded rows")


def test_mixed_activation_dtypes_raise(device):
    dtypes = dict(x=FP32, residual=FP32, parameters=FP32, x_bias=FP32)
    for name in ("residual", "parameters", "x_bias"):
        args = arguments(device, **{**dtypes, name: torch.bfloat16})
        with pytest.raises(TypeError, match=r"expected .*(bfloat16|float32)"):
            ADD_LAYER_NORM.fast(*args)


VIEWS = {
    "one residual for the batch": lambda t: (t, t[0].expand_as(t)),
    "one row for all": lambda t: (t, t[0, 0].expand_as(t)),
    "the first tokens": lambda t: (t[:, :3], t[:, 2:]),
    "batch and tokens swapped": lambda t: (t.transpose(0, 1), t.transpose(0, 1)),
    "every other token": lambda t: (t[:, ::2], t[:, 1:4]),
    "half of the features": lambda t: (t[..., :12], t[..., 12:]),
    "four dimensions": lambda t: (t[None, :, 1:], t[None, :, 1:].flip(1)),
    "features of a column": lambda t: (t.transpose(1, 2)[..., :4], t.transpose(1, 2)[..., 1:]),
}


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("view", VIEWS)
def test_gradients_through_views(device, view, dropout):
    """Gradients through a view match the reference; expanded dimensions sum them."""
    source = torch.randn(3, 5, 24, device=device)
    found = []
    for call in (ADD_LAYER_NORM.fast, ADD_LAYER_NORM.reference):
        torch.manual_seed(1)
        leaf = source.clone().requires_grad_()
        x, residual = VIEWS[view](leaf)
        weight, bias, x_bias = torch.randn(3, x.shape[-1], device=device).requires_grad_()
        seed = torch.tensor(3, device=device)
        y = call(x, residual, weight, bias, x_bias, seed, eps=1e-3, dropout=dropout)
        upstream = torch.randn(y.shape, device=device)
        found.append([y, *torch.autograd.grad(y, (leaf, weight, bias, x_bias), upstream)])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.devices("interpreter", "cuda")  # a CPU has no kernel of it
@pytest.mark.parametrize(
    "view", [v for v in VIEWS if v not in ("features of a column", "four dimensions")]
)
def test_strided_rows_are_not_copied(device, monkeypatch, view):
    x, residual = VIEWS[view](torch.randn(3, 5, 24, device=device))
    seen = []
    real = kernels.add_layer_norm
    monkeypatch.setattr(
        kernels, "add_layer_norm", lambda *args, **k: seen.extend(args[:2]) or real(*args, **k)
    )
    parameters = torch.ones(2, x.shape[-1], device=device)
    ADD_LAYER_NORM.fast(x, residual, *parameters)
    assert [t.data_ptr() for t in seen] == [x.data_ptr(), residual.data_ptr()]
    assert [t.stride() for t in seen] == [x.stride(), residual.stride()]


@pytest.mark.parametrize("features", [1, 17, 72, 768, 1152, 1408])
def test_widths(device, features):
    args = arguments(
        device, x=FP32, residual=FP32, parameters=FP32, x_bias=FP32, shape=(3, features)
    )
    assert_accurate(ADD_LAYER_NORM, args, {"eps": 1e-3})


def test_mean_far_above_standard_deviation(device):
    """A one-pass variance would lose all digits: 1000**2 against 1e-8."""
    x = 1000 + 1e-4 * torch.randn(7, 768, device=device)
    parameters = torch.ones(2, 768, device=device)
    assert_accurate(ADD_LAYER_NORM, (x, torch.zeros_like(x), *parameters, None, None), {})


def test_summands_share_one_gradient_tensor(device):
    args = arguments(device, x=FP32, residual=FP32, parameters=FP32, x_bias=FP32)
    x, residual = (t.requires_grad_() for t in args[:2])
    y = ADD_LAYER_NORM.fast(x, residual, *args[2:])
    dx, dresidual = torch.autograd.grad(y, (x, residual), torch.randn_like(y))
    assert dx.data_ptr() == dresidual.data_ptr() and torch.equal(dx, dresidual)
    # Accumulated .grad tensors are separate: an optimizer may change one in place.
    ADD_LAYER_NORM.fast(x, residual, *args[2:]).square().sum().backward()
    before = residual.grad.clone()
    x.grad.mul_(0)
    assert torch.equal(residual.grad, before)


@pytest.mark.filterwarnings("ignore::vlm_fast.fallback.VlmFastFallbackWarning")
def test_too_many_features_fall_back():
    args = arguments("cpu", x=FP32, residual=FP32, parameters=FP32, x_bias=FP32, shape=(2, 8193))
    assert "8193 features" in ADD_LAYER_NORM.why_not(*args)
    assert torch.equal(ADD_LAYER_NORM(*args), ADD_LAYER_NORM.reference(*args))
