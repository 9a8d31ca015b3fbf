"""The positions of the image tokens of a text sequence, as a table."""

from __future__ import annotations

import torch
from torch import Tensor

from ._launcher import Config, is_traced, kernel, runs_triton
from ._native import native
from ._triton import tl, triton

SLOT_BLOCK = 4096


@kernel(Config({"BLOCK": SLOT_BLOCK}, num_warps=8))
@triton.jit(do_not_specialize=["batch", "sequence", "capacity"])
def image_token_slots_kernel(
    mask_ptr,  # (batch, sequence) bytes, contiguous
    slots_ptr,  # (capacity,) int32
    count_ptr,  # () int32
    batch, sequence, capacity, BLOCK: tl.constexpr,
):  # fmt: skip
    # A program per sequence counts the mask of all earlier sequences, a few kilobytes in L2. That
    # costs less than a second launch or a look-back between programs.
    sample = tl.program_id(0)
    first = sample.to(tl.int64) * sequence
    lane = tl.arange(0, BLOCK)
    partial = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, first, BLOCK):
        row = start + lane
        partial += (tl.load(mask_ptr + row, mask=row < first, other=0) != 0).to(tl.int32)
    found = tl.sum(partial)
    for start in range(0, sequence, BLOCK):
        token = start + lane
        inside = token < sequence
        here = (tl.load(mask_ptr + first + token, mask=inside, other=0) != 0).to(tl.int32)
        slot = found + tl.cumsum(here, axis=0) - 1
        row = (first + token).to(tl.int32)
        tl.store(slots_ptr + slot, row, mask=inside & (here != 0) & (slot < capacity))
        found += tl.sum(here)
    if sample == batch - 1:
        tl.store(count_ptr, found)
        for start in range(found, capacity, BLOCK):
            slot = start + lane
            tl.store(slots_ptr + slot, tl.zeros([BLOCK], dtype=tl.int32), mask=slot < capacity)


def image_token_slots(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor | int]:
    """Return ``slots (capacity,)`` int32 and the count of true entries of ``mask``.

    mask: bool ``(batch, sequence)``, with at least one entry. The count is a 0-d tensor on a GPU,
    so that the host need not wait for it, and an int on a CPU. Slots past the count are 0, so that
    a wrong count of a caller never leads to a wild address.
    """
    mask = mask.contiguous()
    slots = mask.new_empty(capacity, dtype=torch.int32)
    if runs_triton(mask) or is_traced(mask):
        count = mask.new_empty((), dtype=torch.int32)
        if not runs_triton(mask):
            return slots, count
        batch, sequence = mask.shape
        image_token_slots_kernel(
            lambda blocks: (batch,),
            mask.view(torch.uint8), slots, count, batch, sequence, capacity,
        )  # fmt: skip
        return slots, count
    if native is not None and mask.is_cpu:
        found = native.image_token_slots(mask.data_ptr(), mask.numel(), slots.data_ptr(), capacity)
    else:
        rows = mask.flatten().nonzero().flatten()
        found = rows.numel()
        slots[:found] = rows[:capacity]
    if found < capacity:
        slots[found:] = 0
    return slots, found
