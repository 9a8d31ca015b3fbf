"""Arithmetic of sizes on the host."""

from __future__ import annotations

from ._triton import triton


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up. Triton's own is a function of kernels and costs the host 2 us."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not less than a positive integer."""
    if type(number) is int:
        return 1 << (number - 1).bit_length()
    power: int = triton.next_power_of_2(number)  # of a symbolic integer
    return power
