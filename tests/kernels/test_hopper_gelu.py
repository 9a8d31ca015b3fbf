"""GELU of the Hopper GEMM epilogues: its C++ source, compiled for the CPU, against float64."""

import ctypes
import math
import subprocess
from pathlib import Path

import pytest
import torch

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "hopper_gelu.h"
LOOP = """
#include "HEADER"
extern "C" void pass(const float* z, float* h, float* slope, long count) {
  for (long i = 0; i < count; ++i) {
    const float cdf = vlm_fast::normal_cdf(z[i]);
    h[i] = vlm_fast::gelu(z[i], cdf);
    slope[i] = vlm_fast::gelu_slope(z[i], cdf);
  }
}
"""
ULP = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gelu")
    source, library = folder / "gelu.cpp", folder / "gelu.so"
    source.write_text(LOOP.replace("HEADER", str(HEADER)))
    subprocess.run(
        ["g++", "-O1", "-std=c++17", "-fPIC", "-shared", source, "-o", library], check=True
    )
    function = ctypes.CDLL(str(library))["pass"]

    def evaluate(z):
        h, slope = torch.empty_like(z), torch.empty_like(z)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (z, h, slope))
        function(*pointers, ctypes.c_long(z.numel()))
        return h, slope

    return evaluate


def exact(z):
    z = z.double().requires_grad_()
    h = torch.nn.functional.gelu(z)
    return h.detach(), torch.autograd.grad(h.sum(), z)[0]


def every_bf16(most):
    """All values of bf16 in [-most, most]."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    return values[values.abs() <= most].float()


def test_gelu_and_derivative_within_one_ulp_of_max_1_z(evaluate):
    # erf tends to 1 and -1, so rounding errors are absolute: one ulp of 1, or of z in z * erf.
    torch.manual_seed(0)
    for z in (every_bf16(10), torch.rand(1_000_000) * 20 - 10):
        h, slope = evaluate(z)
        true_h, true_slope = exact(z)
        scale = z.double().abs().clamp(min=1)
        assert ((h - true_h).abs() <= ULP * scale).all()
        assert ((slope - true_slope).abs() <= 2 * ULP).all()
        # Near zero the result is as small as z, so the error must be relative to z.
        small = z.abs() < 0.5
        assert ((h - true_h)[small].abs() <= 2 * ULP * z[small].abs() + 1e-45).all()


def test_bf16_within_one_ulp_except_near_zero(evaluate):
    z = every_bf16(10)
    z = z[(z > -4) & (z.abs() > 1e-30)]  # below -4 |gelu| < 1.3e-4 and falls like exp(-z^2 / 2)
    h, slope = (t.bfloat16().double() for t in evaluate(z))
    true_h, true_slope = exact(z)
    ulp = torch.finfo(torch.bfloat16).eps
    assert ((h - true_h).abs() <= ulp * true_h.abs()).all()
    assert ((slope - true_slope).abs() <= ulp * true_slope.abs().clamp(min=2**-10)).all()


def test_infinities_and_nan_follow_the_formula(evaluate):
    """ATen is no reference here: at +Inf its vector code gives NaN and its scalar code Inf."""
    z = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30, 0.0, -0.0])
    wide = z.double()
    cdf, density = torch.special.ndtr(wide), (-wide.square() / 2).exp() / math.sqrt(2 * math.pi)
    h, slope = evaluate(z)
    for found, expected in ((h, wide * cdf), (slope, cdf + wide * density)):
        torch.testing.assert_close(found, expected.float(), equal_nan=True, rtol=0, atol=0)
