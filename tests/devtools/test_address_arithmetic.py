"""The check of compiled kernels for addresses that overflow in 32 bits can fail."""

import pytest

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support.address_arithmetic import overflowing_products


@triton.jit
def clear_rows_kernel(x_ptr, cols, CASE: tl.constexpr, BLOCK: tl.constexpr):
    row, lane = tl.program_id(0), tl.arange(0, BLOCK)
    if CASE == "wide":
        tl.store(x_ptr + row.to(tl.int64) * cols + lane, 0.0)
    elif CASE == "narrow":
        tl.store(x_ptr + row * cols + lane, 0.0)
    elif CASE == "widened too late":
        tl.store(x_ptr + (row * cols + lane).to(tl.int64), 0.0)
    elif CASE == "narrow, carried by a loop":
        first = row * cols
        for _ in range(0, cols, BLOCK):
            tl.store(x_ptr + first + lane, 0.0)
            first += BLOCK
    elif CASE == "narrow in a branch":
        first = lane
        if cols > 1:
            first = row * cols + lane
        tl.store(x_ptr + first, 0.0)
    elif CASE == "narrow, carried by a while loop":
        first = row * 0
        while first < cols:
            tl.store(x_ptr + first + lane, 0.0)
            first += row * cols
    elif CASE == "blocks of columns":
        tl.store(x_ptr + tl.program_id(1) * BLOCK + lane, 0.0)
    elif CASE == "blocks along x":
        tl.store(x_ptr + row * BLOCK + lane, 0.0)
    else:
        tl.static_assert(CASE == "blocks of a loop")
        for block in range(tl.cdiv(cols, BLOCK)):
            tl.store(x_ptr + block * BLOCK + lane, 0.0)


@pytest.mark.parametrize(
    "case, faults",
    [
        ("wide", 0),
        ("narrow", 1),
        ("widened too late", 1),
        ("narrow, carried by a loop", 1),
        ("narrow, carried by a while loop", 1),
        ("narrow in a branch", 1),
        ("blocks of columns", 0),
        ("blocks along x", 1),
        ("blocks of a loop", 0),
    ],
)
def test_address_check_finds_32_bit_products(fresh_cache, case, faults):
    signature = dict(x_ptr="*fp32", cols="i32", CASE="constexpr", BLOCK="constexpr")
    source = ASTSource(clear_rows_kernel, signature, dict(CASE=case, BLOCK=128))
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(overflowing_products(compiled.asm["ttir"])) == faults
