"""Gradients of parameters: sums of shares, by the tolerance rule, for many and few rows."""

import pytest
import torch

from tests.support.guard_bands import GuardBands
from tests.support.op_accuracy import assert_accurate
from vlm_fast.kernels import _sum_shares
from vlm_fast.kernels._launcher import recording
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import tolerance

pytestmark = pytest.mark.devices("interpreter", "cuda")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COLUMNS = {
    "one number": [(1, FP32)],
    "weight and bias": [(100, BF16), (100, BF16)],
    "weight, bias, x_bias": [(768, FP32), (768, FP32), (768, BF16)],
    "only the bias": [None, (1152, FP16), None],
    "weight and a gate": [(1408, BF16), None, (1, FP32)],
    "four widths": [(5, FP32), (1, BF16), (4096, FP16), (17, FP32)],
}


def gradients_of(columns, device):
    return [c if c is None else torch.empty(c[0], dtype=c[1], device=device) for c in columns]


@pytest.mark.parametrize("count", [1, 2, 31, 257, 1025])
@pytest.mark.parametrize("columns", COLUMNS)
def test_sums_by_tolerance_rule(device, columns, count):
    with GuardBands() as bands:
        gradients = gradients_of(COLUMNS[columns], device)
        wanted = [gradient for gradient in gradients if gradient is not None]
        shares = torch.randn(count, sum(g.numel() for g in wanted), device=device)
        shares = bands.lay_out(shares, "padded rows")
        _sum_shares.sum_shares(shares, *gradients)
    bands.check()
    parts = shares.split([gradient.numel() for gradient in wanted], 1)
    for gradient, part in zip(wanted, parts, strict=True):
        plain = part.sum(0).to(gradient.dtype)
        verdict = tolerance.judge("sum", gradient, plain, part.double().sum(0), gradient=True)
        assert verdict.ok, verdict


def test_zero_drops_rounding_errors_and_keeps_nan(device):
    shares = torch.randn(40, 30, device=device)
    shares[7, 12] = torch.nan
    gradients = [torch.empty(10, device=device) for _ in range(3)]
    _sum_shares.sum_shares(shares, *gradients, zero=1)
    assert gradients[1].isnan().nonzero().tolist() == [[2]]
    assert not gradients[1].nan_to_num().any() and gradients[0].all() and gradients[2].all()


@pytest.mark.parametrize("least", [4, 16, 64])
@pytest.mark.parametrize("rows", [0, 1, 8, 9, 32, 33, 128, 129, 8192, 8193, 2**31])
def test_programs_cover_all_rows(rows, least):
    rows_per_program, programs = _sum_shares.split_rows(rows, least)
    assert 1 <= programs <= _sum_shares.MAX_PROGRAMS
    assert (programs - 1) * rows_per_program < max(rows, 1) and programs * rows_per_program >= rows
    assert programs == 1 or rows_per_program >= least


SIZES = [  # rows and columns
    (1, 4096), (2, 1408), (31, 1152), (257, 5), (577, 100), (2049, 1), (257, 729), (37, 1152),
    *[pytest.param(s, marks=pytest.mark.slow) for s in ((257, 768), (2049, 5), (2049, 4096))],
]  # fmt: skip
OTHERS = {
    "add_layer_norm": [dict(x_biased=True), dict(x_biased=True, dropout=0.25)],
    "gated_add": [dict(), dict(per_feature=True)],
    "gated_add_norm": [dict(biased=True), dict(per_feature=True, norm="rms", hidden=True)],
}


@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", OTHERS)
def test_gradients_by_tolerance_rule(device, name, size, dtype):
    """Also with parameters in fp32 beside bf16 rows."""
    op = OPS[name]
    rows, cols = size
    for other in OTHERS[name]:
        args, options = op.sample(dict(shape=(1, rows, cols), **other), dtype, device)
        by_name = dict(zip(op.tensors, args, strict=True))
        for parameter in ("weight", "bias", "gate", "x_bias"):
            if by_name.get(parameter) is not None:
                by_name[parameter] = by_name[parameter].float()
        assert_accurate(op, tuple(by_name.values()), options)


def test_pixel_shuffle_norm_of_many_rows(device):
    op = OPS["pixel_shuffle_norm"]
    for norm_after in (True, False):
        shape = dict(batch=1, height=34, width=34, features=40, norm="layer", eps=0.5)
        args, options = op.sample({**shape, "norm_after": norm_after}, BF16, device)
        with recording() as launches:
            assert_accurate(op, args, options)
        assert "sum_shares_kernel" in [launch.kernel.name for launch in launches]
