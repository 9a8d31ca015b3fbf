"""The address check itself: it reports a single element out of bounds and no valid access."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.devices("interpreter")


@triton.jit
def copy_kernel(x_ptr, y_ptr, loaded, stored, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < loaded)
    tl.store(y_ptr + at, x, mask=at < stored)


@triton.jit
def count_kernel(out_ptr, first, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + first + at, at * 0 + 1, mask=at >= 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
def test_out_of_window_reads_and_writes_are_found(dtype):
    x, y = torch.ones(2, 32).to(dtype)[:, :20], torch.zeros(64).to(dtype)[8:28]
    copy_kernel[(1,)](x[0], y, 20, 20, BLOCK=32)
    assert y.sum() == 20
    copy_kernel[(1,)](x, y, 32, 20, BLOCK=32)  # the window of x ends in its second row
    for loaded, stored, kind in ((21, 20, "load"), (20, 21, "store")):
        with pytest.raises(InterpreterError, match=f"{kind} of 1 elements outside"):
            copy_kernel[(1,)](x[0], y, loaded, stored, BLOCK=32)


def test_out_of_window_atomics_are_found():
    out = torch.zeros(20, dtype=torch.int32)
    count_kernel[(1,)](out, 4, BLOCK=16)
    assert out.sum() == 16
    for first in (-1, 5):
        with pytest.raises(InterpreterError, match="atomic of 1 elements outside"):
            count_kernel[(1,)](out, first, BLOCK=16)


def test_tensors_of_earlier_launches_are_out_of_bounds():
    x, y = torch.ones(2, 32), torch.zeros(32)
    copy_kernel[(1,)](x, y, 32, 32, BLOCK=32)
    with pytest.raises(InterpreterError, match="load of 32 elements outside"):
        copy_kernel[(1,)](x[0, :0], y, 32, 32, BLOCK=32)
