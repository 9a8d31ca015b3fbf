"""How far ahead a kernel's loop over rows loads."""

from __future__ import annotations

from ._triton import triton


@triton.constexpr_function
def stages(bits, elements, room, most=4):
    """The ``num_stages`` of a loop that loads so many elements of so many bits at a time.

    All stages but one are in shared memory, as many as fit in ``room`` bytes: the next rows are
    loaded while these are computed. More than four stages hide no more latency. The number is
    not a global constant, because our launchers serve no kernel that reads one.
    """
    return min(room // (bits // 8 * elements) + 1, most)
