"""How far ahead a kernel's loop over rows loads."""

from __future__ import annotations

from ._triton import triton

MOST_STAGES = 4


@triton.constexpr_function
def stages(bits, elements, room):
    """The ``num_stages`` of a loop that loads so many elements of so many bits at a time.

    All stages but one are in shared memory, as many as fit in ``room`` bytes, but at least one: the
    next rows are loaded while these are computed.
    """
    return min(max(room // (bits // 8 * elements), 1) + 1, MOST_STAGES)
