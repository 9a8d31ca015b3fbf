"""The corrected Triton interpreter against torch."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

pytestmark = pytest.mark.devices("interpreter")

BF16 = torch.bfloat16
LENGTH = 64


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, LENGTH: tl.constexpr):
    at = tl.arange(0, LENGTH)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, x + y)
    tl.store(out_ptr + LENGTH + at, x - y)
    tl.store(out_ptr + 2 * LENGTH + at, x * y)
    tl.store(out_ptr + 3 * LENGTH + at, -x)
    tl.store(out_ptr + 4 * LENGTH + at, tl.maximum(x, y).to(tl.bfloat16))
    tl.store(out_ptr + 5 * LENGTH + at, tl.where(x < y, x, y))
    tl.store(out_ptr + 6 * LENGTH + at, tl.abs(x))
    tl.store(out_ptr + 7 * LENGTH + at, tl.full([LENGTH], 1.00390625, dtype=tl.bfloat16))
    tl.store(out_ptr + 8 * LENGTH + at, tl.fma(x, y, x))


def test_bf16_arithmetic_matches_torch():
    torch.manual_seed(0)
    x, y = torch.randn(2, LENGTH).to(BF16)
    x[:4] = torch.tensor([3.0e38, -3.0e38, 1e-39, -0.0])
    out = torch.empty(9, LENGTH, dtype=BF16)
    arithmetic_kernel[(1,)](x, y, out, LENGTH=LENGTH)
    fused = (x.double() * y.double() + x.double()).to(BF16)
    full = torch.full((LENGTH,), 1.00390625, dtype=BF16)
    expected = [x + y, x - y, x * y, -x, x.maximum(y), x.minimum(y), x.abs(), full, fused]
    for row, wanted in zip(out, expected, strict=True):
        assert torch.equal(row, wanted)


@triton.jit
def reduce_kernel(x_ptr, out_ptr, LENGTH: tl.constexpr):
    at = tl.arange(0, LENGTH)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + 0, tl.sum(x))
    # Not tl.max and tl.min, which widen bf16 themselves.
    tl.store(out_ptr + 1, tl.reduce(x, 0, tl.standard._elementwise_max))
    tl.store(out_ptr + 2, tl.reduce(x, 0, tl.standard._elementwise_min))
    tl.store(out_ptr + 3 + at, tl.associative_scan(x, 0, tl.standard._sum_combine))


def test_bf16_reductions():
    x = -torch.arange(1, LENGTH + 1).to(BF16)  # every partial sum below 256 is exact
    out = torch.empty(3 + LENGTH, dtype=BF16)
    reduce_kernel[(1,)](x, out, LENGTH=LENGTH)
    steps = [x[0]]
    for value in x[1:]:
        steps.append(steps[-1] + value)
    assert out[1] == -1 and out[2] == -LENGTH
    assert (
        abs(out[0] + LENGTH * (LENGTH + 1) / 2) <= 16
    )  # one of the possible orders of bf16 additions
    assert torch.equal(out[3:], torch.stack(steps))


def test_bf16_sum_rounds_at_each_addition():
    x = torch.full((LENGTH,), 1.0, dtype=BF16)
    x[0] = 512.0  # fp32 accumulation would give 575
    out = torch.empty(3 + LENGTH, dtype=BF16)
    reduce_kernel[(1,)](x, out, LENGTH=LENGTH)
    assert out[-1] == 512 and out[0] != torch.tensor(575.0).to(BF16)
