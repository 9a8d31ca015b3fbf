"""The functions of the extension vlm_fast._hopper in Python, for tests without a Hopper GPU.

They have the extension's arguments: addresses, sizes and pitches. They refuse what the extension
does not support, and leave NaN where it writes nothing.
"""

import contextlib
import ctypes
from unittest import mock

import torch
import torch.nn.functional as F

from vlm_fast.kernels import _hopper

NAN = float("nan")
ROWS = {"linear_gelu": "LINEAR_GELU_ROWS", "gelu_backward": "GELU_BACKWARD_ROWS"}


def matrix(address, rows, cols, pitch=None, dtype=torch.bfloat16):
    pitch = cols if pitch is None else pitch
    size = dtype.itemsize
    assert address % _hopper.ALIGNMENT == 0 and pitch * size % _hopper.ALIGNMENT == 0, "no TMA row"
    assert pitch >= cols > 0 and rows > 0
    memory = (ctypes.c_char * (((rows - 1) * pitch + cols) * size)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, cols), (pitch, 1))


class PythonGemms:
    """A fake extension that records the calls of its functions."""

    def __init__(self):
        self.calls = []

    def linear_gelu(self, x, x_row, weight, bias, z, h, rows, hidden, inner, stream):
        self.calls.append("linear_gelu")
        sums = matrix(x, rows, inner, x_row).float() @ matrix(weight, hidden, inner).float().t()
        sums = (sums + matrix(bias, 1, hidden).float() if bias else sums).bfloat16()
        if z:
            matrix(z, rows, hidden).copy_(sums)
        matrix(h, rows, hidden).copy_(F.gelu(sums.float()))

    def gelu_backward(
        self, dy, dy_row, weight, z, dz, h, bias_sums, rows, hidden, out_features, stream
    ):
        self.calls.append("gelu_backward")
        kept = matrix(z, rows, hidden).float()
        weight = matrix(weight, out_features, hidden).float()
        dh = matrix(dy, rows, out_features, dy_row).float() @ weight
        through = torch.ops.aten.gelu_backward(dh, kept)
        matrix(dz, rows, hidden).copy_(through)
        if h:
            matrix(h, rows, hidden).copy_(F.gelu(kept))
        if bias_sums:
            padded = -(-hidden // _hopper.TILE) * _hopper.TILE
            tiles = -(-rows // _hopper.TILE)
            sums = matrix(bias_sums, tiles, padded, dtype=torch.float32).fill_(NAN)
            for i in range(tiles):
                sums[i, :hidden] = through[i * _hopper.TILE : (i + 1) * _hopper.TILE].sum(0)


def sum_shares(shares, gradient):
    if shares is not None:
        gradient.copy_(shares[:, : gradient.numel()].sum(0))


@contextlib.contextmanager
def python_gemms(*names):
    """Use the Python GEMMs (by default both) at every size, as on a Hopper GPU."""
    gemms = PythonGemms()
    chosen = {ROWS[name]: 1 if name in (names or ROWS) else 2**62 for name in ROWS}
    with (
        mock.patch.multiple(_hopper, native=gemms, runs_here=lambda like: True, **chosen),
        mock.patch.object(_hopper, "sum_shares", sum_shares),
        mock.patch.object(_hopper, "why_absent", None),
    ):
        yield gemms
