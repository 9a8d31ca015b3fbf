"""Activations inside kernels, against exact values and ATen's formulas."""

import math

import pytest
import torch

from vlm_fast.kernels.gated_mlp import gated_activation
from vlm_fast.kernels.mlp import ATEN, mlp_activation_backward

pytestmark = [
    pytest.mark.devices("interpreter", "cuda"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),  # by NumPy
]


def test_gelu_is_as_exact_as_erf(device):
    """Value and derivative at 8,000 points, also where the normal tail underflows."""
    z = torch.cat([torch.linspace(-14, 14, 7900), torch.logspace(-30, 30, 50)])
    z = torch.cat([z, -z[-50:]]).to(device)
    exact = z.double()
    cdf = torch.special.ndtr(exact)
    density = torch.exp(-exact * exact / 2) / math.sqrt(2 * math.pi)
    rows = z[:, None].contiguous()
    value = gated_activation(rows, torch.ones_like(rows), "gelu")[:, 0].double()
    assert ((value - exact * cdf).abs() <= 1.2e-7 * (exact.abs() + 1)).all()
    slope, h, _, _ = mlp_activation_backward(
        rows, torch.ones_like(rows), rows, len(rows), len(rows), "gelu",
        want_h=True, want_dbias=False, want_dbias_2=False,
    )  # fmt: skip
    error = slope[:, 0].double() - (cdf + exact * density)
    assert error.abs().max() <= 3e-7 and torch.equal(h[:, 0].double(), value)


@pytest.mark.parametrize("activation", ATEN)
def test_values_that_are_not_finite(device, activation):
    z = torch.tensor([[math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30, -1e30]], device=device)
    ours = gated_activation(z, torch.ones_like(z), activation)
    plain = ATEN[activation](z)
    if activation == "gelu":  # ATen's vectorised code makes Inf NaN
        plain = 0.5 * z * (1 + torch.erf(z * math.sqrt(0.5)))
    torch.testing.assert_close(ours, plain, equal_nan=True, rtol=0, atol=1e-7)


@pytest.mark.devices("cpu", "interpreter", "cuda")
@pytest.mark.parametrize("gap", [0, 1])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_activation_is_written_over_private_z(device, activation, gap):
    """Not if there are gaps between images, because h has none."""
    images, tokens, cols = 2, 9, 24
    z = torch.randn(images * (tokens + gap) - gap, cols, device=device)
    dh, dy = torch.randn(2, images * tokens, cols, device=device)
    found = []
    for overwrite in (False, True):
        given = z.clone()
        dz, h, dbias, _ = mlp_activation_backward(
            given, dh.clone(), dy, tokens, tokens + gap, activation,
            want_h=True, want_dbias=True, want_dbias_2=False, overwrite_z=overwrite,
        )  # fmt: skip
        found.append((dz, h.reshape(dh.shape), dbias))
        assert torch.equal(given, z) != (overwrite and not gap)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
