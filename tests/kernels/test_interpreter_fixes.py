"""The corrected Triton interpreter against torch."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

pytestmark = pytest.mark.devices("interpreter")

BF16 = torch.bfloat16
LENGTH = 64


def hostile_floats() -> torch.Tensor:
    """Random bit patterns (NaN, Inf and subnormals among them), and every tie of bf16 rounding."""
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31 - 1, (65536,), generator=generator)
    ties = torch.arange(0, 65536) << 16 | 0x8000
    return torch.cat([anything, ties - 2**31]).to(torch.int32).view(torch.float32)


@triton.jit
def cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.int32], ids=str)
def test_cast_to_bf16_is_bitwise_torch(source):
    x = hostile_floats()
    x = x.view(torch.int32) if source is torch.int32 else x.to(source)
    y = torch.empty(x.shape, dtype=BF16)
    cast_kernel[(x.numel() // 8192,)](x, y, BLOCK=8192)
    expected = x.to(BF16)
    assert torch.equal(y.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(y[number].view(torch.int16), expected[number].view(torch.int16))


@pytest.mark.parametrize("target", [torch.float32, torch.float16], ids=str)
def test_cast_from_bf16_matches_torch(target):
    x = torch.arange(-32768, 32768).to(torch.int16).view(BF16)
    y = torch.empty(x.shape, dtype=target)
    cast_kernel[(x.numel() // 8192,)](x, y, BLOCK=8192)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.nan_to_num(7), x.to(target).nan_to_num(7))


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
def dot_kernel(x_ptr, y_ptr, out_ptr, INNER: tl.constexpr, SIDE: tl.constexpr):
    row, inner = tl.arange(0, SIDE), tl.arange(0, INNER)
    x = tl.load(x_ptr + row[:, None] * INNER + inner[None, :])
    y = tl.load(y_ptr + inner[:, None] * SIDE + row[None, :])
    tl.store(out_ptr + row[:, None] * SIDE + row[None, :], tl.dot(x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_accumulates_products_in_fp32(dtype):
    torch.manual_seed(0)
    x, y = torch.randn(32, 128).to(dtype), torch.randn(128, 32).to(dtype)
    out = torch.empty(32, 32)
    dot_kernel[(1,)](x, y, out, INNER=128, SIDE=32)
    exact = x.double() @ y.double()
    assert (out - exact).abs().max() < 128 * 2**-24 * exact.abs().max()


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


@triton.jit
def atomic_kernel(at_ptr, x_ptr, out_ptr, count, LENGTH: tl.constexpr):
    lane = tl.arange(0, LENGTH)
    inside = lane < count
    at = tl.load(at_ptr + lane, mask=inside, other=0)
    tl.atomic_add(out_ptr + at, tl.load(x_ptr + lane), mask=inside)


def test_bf16_atomic_add_to_repeated_addresses():
    at = torch.tensor([0, 1, 0, 3] * (LENGTH // 4))
    x, out = torch.full((LENGTH,), 0.5, dtype=BF16), torch.ones(4, dtype=BF16)
    atomic_kernel[(1,)](at, x, out, LENGTH - 4, LENGTH=LENGTH)
    assert out.tolist() == [16.0, 8.5, 1.0, 8.5]


@triton.jit
def extrema_kernel(x_ptr, y_ptr, out_ptr, LENGTH: tl.constexpr):
    at = tl.arange(0, LENGTH)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, tl.maximum(x, y))
    tl.store(out_ptr + LENGTH + at, tl.minimum(x, y))
    strict = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + 2 * LENGTH + at, strict)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_maximum_and_minimum_ignore_nan(dtype):
    x, y = torch.full((4,), torch.nan).to(dtype), torch.tensor([1.0, -1.0, torch.nan, 0.0])
    out = torch.empty(3, 4)
    extrema_kernel[(1,)](x, y.to(dtype), out, LENGTH=4)
    assert torch.equal(out[:2].nan_to_num(5), y.nan_to_num(5).expand(2, 4))
    assert out[2].isnan().all()


@triton.jit
def loop_kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + at, mask=at < length, other=0.0)
    tl.store(out_ptr, tl.sum(total))


def test_loop_bound_known_at_launch():
    out = torch.empty(())
    loop_kernel[(1,)](torch.ones(37), out, 37, BLOCK=16)
    assert out == 37


SCALE = tl.constexpr(1.5)


@triton.jit
def scaled_kernel(x_ptr, out_ptr, LENGTH: tl.constexpr):
    at = tl.arange(0, LENGTH)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.exp(SCALE * x))
    tl.store(out_ptr + LENGTH + at, tl.abs(SCALE - x))


def test_module_constant_multiplies_a_tensor():
    x, out = torch.linspace(-2, 2, LENGTH), torch.empty(2, LENGTH)
    scaled_kernel[(1,)](x, out, LENGTH=LENGTH)
    torch.testing.assert_close(out, torch.stack([(1.5 * x).exp(), (1.5 - x).abs()]))
