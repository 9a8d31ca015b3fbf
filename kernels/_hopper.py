"""Optional CUTLASS GEMMs for Hopper that compute GELU or its gradient in the epilogue.

They are in the extension ``vlm_fast._hopper`` (csrc/hopper_*), which is built on request, with
``VLM_FAST_CUTLASS=1`` (see setup.py). Without it, on another GPU, in another dtype or for fewer
rows, cuBLAS multiplies and a separate kernel does the element-wise pass.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ._launcher import is_traced, on_device_of
from ._sum_shares import sum_shares

native: Any
why_absent: str | None
try:
    native, why_absent = import_module(".._hopper", __package__), None
except ModuleNotFoundError:
    native, why_absent = None, "it was not built (VLM_FAST_CUTLASS=1)"
except ImportError as error:
    native, why_absent = None, str(error)

CAPABILITY = (9, 0)
ALIGNMENT = 16  # bytes; TMA reads only rows that start at a multiple of 16
TILE = 128  # rows and columns of the result that a thread block computes at a time

# The fewest rows for which each GEMM is used. Measured on an H200 against cuBLAS and a separate
# pass: linear_gelu takes 1.15 times as long at 2,056 rows, and 1/1.22 of the time at 4,608;
# gelu_backward takes 1.03 times as long at 32 rows, and 1/1.27 of the time at 512.
LINEAR_GELU_ROWS = 3072
GELU_BACKWARD_ROWS = 128


def takes_linear_gelu(x: Tensor, rows: int, inner: int, hidden: int) -> bool:
    """Whether `linear_gelu` serves ``(rows, inner) @ (inner, hidden)`` with the dtype of x."""
    return _serves(x, inner, hidden) and rows >= LINEAR_GELU_ROWS


def takes_gelu_backward(x: Tensor, rows: int, hidden: int, out: int) -> bool:
    """Whether `gelu_backward` serves ``(rows, out) @ (out, hidden)`` with the dtype of x."""
    return _serves(x, hidden, out) and rows >= GELU_BACKWARD_ROWS


def _serves(x: Tensor, *widths: int) -> bool:
    return (
        runs_here(x)
        and x.dtype is torch.bfloat16
        and all(width > 0 and width * x.element_size() % ALIGNMENT == 0 for width in widths)
    )


def runs_here(x: Tensor) -> bool:
    """Whether the extension is built and the tensor is on a Hopper GPU."""
    return native is not None and x.is_cuda and _is_hopper(x.device.index)


@functools.cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) == CAPABILITY


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, keep_z: bool
) -> tuple[Tensor | None, Tensor]:
    """Return ``z = x W^T + bias``, or None without ``keep_z``, and ``gelu(z)``.

    x ``(rows, inner)``, weight ``(hidden, inner)``, bias ``(hidden,)``; results ``(rows, hidden)``.
    """
    (rows, inner), hidden = x.shape, weight.shape[0]
    h = x.new_empty(rows, hidden)
    z = torch.empty_like(h) if keep_z else None
    x, weight, bias = _in_tma_rows(x), _aligned(weight.contiguous()), _aligned(bias)
    if not is_traced(h):
        with on_device_of(h):
            native.linear_gelu(
                x.data_ptr(), x.stride(0), weight.data_ptr(), _address(bias), _address(z),
                h.data_ptr(), rows, hidden, inner, _stream(h),
            )  # fmt: skip
    return z, h


def gelu_backward(
    z: Tensor, dy: Tensor, weight: Tensor, *, want_h: bool, want_dbias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return ``dz = (dy W) gelu'(z)`` and, if wanted, ``gelu(z)`` and the sum of dz over rows.

    z ``(rows, hidden)``, contiguous; dy ``(rows, out)``; weight ``(out, hidden)``.
    """
    (rows, hidden), out = z.shape, weight.shape[0]
    dz = torch.empty_like(z)
    h = torch.empty_like(z) if want_h else None
    sums = dbias = None
    if want_dbias:
        dbias = z.new_empty(hidden)
        tiles, padded = -(-rows // TILE), -(-hidden // TILE) * TILE
        sums = z.new_empty(tiles, padded, dtype=torch.float32)
    z, dy, weight = _aligned(z), _in_tma_rows(dy), _aligned(weight.contiguous())
    if not is_traced(dz):
        with on_device_of(dz):
            native.gelu_backward(
                dy.data_ptr(), dy.stride(0), weight.data_ptr(), z.data_ptr(), dz.data_ptr(),
                _address(h), _address(sums), rows, hidden, out, _stream(dz),
            )  # fmt: skip
    sum_shares(sums, dbias)
    return dz, h, dbias


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(tensor: Tensor) -> int:
    return torch._C._cuda_getCurrentRawStream(tensor.device.index) if tensor.is_cuda else 0


def _in_tma_rows(x: Tensor) -> Tensor:
    """A matrix as dense rows that TMA can read, copied only if necessary."""
    pitch = x.stride(0)
    fits = x.stride(1) == 1 and pitch >= x.shape[1] and pitch * x.element_size() % ALIGNMENT == 0
    return _aligned(x) if fits else x.contiguous()


def _aligned(x: Any) -> Any:
    """x, copied only if its address is not aligned."""
    if x is None or is_traced(x) or x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
