"""Device time of ATen's kernels, from their bytes and from the sizes of products."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlm_fast.devtools.device_time.pass_kernels import AtenKernel

MULTIPROCESSORS = 132  # of an H200
CYCLES = 1.98e9  # a second, at the clock that was measured under load
# Orders of the norms that join times, chosen by the error of left-out ops: the bytes of a kernel
# overlap with its arithmetic; what a program waits for overlaps little with other waits (1: a sum).
KERNEL_ORDER, PROGRAM_ORDER = 4.0, 1.2
Constants = Mapping[str, float]
CLASSES = ("elementwise", "reduction", "index", "product")
REDUCTIONS = (
    "sum", "mean", "softmax", "layer_norm", "norm", "max", "amax", "any", "all", "cumsum",
    "logsumexp", "argmax", "var", "std",
)  # fmt: skip
INDEXED = ("scatter", "index", "gather", "sort", "nonzero", "masked_select", "embedding", "topk")
SMALL_BYTES = 3e6  # a reduction of fewer bytes has a smaller fixed cost


def class_of(kernel: AtenKernel) -> str:
    """Which of `CLASSES` an ATen operation is, by its name."""
    if kernel.sizes:
        return "product"
    name = kernel.name.removeprefix("aten.")
    if any(word in name for word in INDEXED):
        return "index"
    return "reduction" if any(word in name for word in REDUCTIONS) else "elementwise"


def columns(kernel: AtenKernel) -> tuple[float, ...]:
    """Bytes, batch, rows, columns and inner size of a product or zeros, index in `CLASSES`."""
    return (kernel.bytes, *(kernel.sizes or (0, 0, 0, 0)), CLASSES.index(class_of(kernel)))


def longest(parts: Mapping[str, Tensor], order: float = KERNEL_ORDER) -> Tensor:
    """Norm of this order of times that overlap: at least the longest of them."""
    stacked = torch.stack(list(parts.values()))
    largest = stacked.amax(0).clamp_min(1e-30)
    return largest * (stacked / largest).pow(order).sum(0).pow(1 / order)


def product_parts(aten: Tensor, c: Constants) -> dict[str, Tensor]:
    """Microseconds of products: of their bytes, and of their tiles over the multiprocessors."""
    size, batch, rows, columns, inner, _ = aten
    large = batch * torch.ceil(rows / 128) * torch.ceil(columns / 128)
    small = batch * torch.ceil(rows / 64) * torch.ceil(columns / 64)
    cycles = 8 * inner  # of a tile of 128 x 128, at 4,096 operations a cycle
    waves = torch.where(
        large >= MULTIPROCESSORS,
        torch.ceil(large / MULTIPROCESSORS),
        torch.where(
            small >= MULTIPROCESSORS,
            (large / MULTIPROCESSORS).clamp_min(0.25),
            (small / MULTIPROCESSORS / 4).clamp_min(32 / inner.clamp_min(1)),  # the inner sum split
        ),
    )
    aligned = (inner % 8 == 0) & (columns % 8 == 0)
    slower = 1 + (c["unaligned"] - 1) * (~aligned).to(size.dtype)
    return {
        "products": waves * cycles / c["product_share"] * slower / CYCLES * 1e6,
        "memory": size / (c["product_bandwidth"] * 1e6),
    }


def microseconds(aten: Tensor, c: Constants) -> Tensor:
    """Time of each kernel without the gap of its launch; ``aten`` has a column per kernel."""
    size, kind = aten[0], aten[5]
    times = {
        "elementwise": size / (c["elementwise_bandwidth"] * 1e6),
        "reduction": c["reduction"] * (size / SMALL_BYTES).clamp_max(1.0)
        + size / (c["reduction_bandwidth"] * 1e6),
        "index": c["reduction"] + size / (c["index_bandwidth"] * 1e6),
        "product": c["product"] + longest(product_parts(aten, c)),
    }
    total = torch.zeros_like(size)
    for number, name in enumerate(CLASSES):
        total = torch.where(kind == number, times[name], total)
    return total
