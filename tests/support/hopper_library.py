"""A stand-in for the library of Hopper GEMMs: its functions, over the same addresses, on a CPU.

What it is given is what the library would be given: addresses, sizes and pitches, nothing else. It
refuses what the library could not take, and leaves NaN wherever the library writes nothing.
"""

import contextlib
import ctypes
from unittest import mock

import torch
import torch.nn.functional as F

from vlm_fast.kernels import _configs, _hopper

NAN = float("nan")


def matrix(address, rows, cols, pitch=None, dtype=torch.bfloat16):
    pitch = cols if pitch is None else pitch
    size = dtype.itemsize
    assert address % _hopper.ALIGNMENT == 0 and pitch * size % _hopper.ALIGNMENT == 0, "no TMA row"
    assert pitch >= cols > 0 and rows > 0
    memory = (ctypes.c_char * (((rows - 1) * pitch + cols) * size)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, cols), (pitch, 1))


class Emulated:
    """Has the functions as attributes, and counts what was called."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, symbol):
        prefix = f"vlm_fast_v{_hopper.ABI}_"
        name, config = symbol.removeprefix(prefix).rsplit("_", 1)
        if not symbol.startswith(prefix) or name not in _hopper.GEMMS:
            raise AttributeError(symbol)
        tile = _hopper.GEMMS[name].configs[int(config)]

        def function(*arguments):
            kinds = _hopper.GEMMS[name].argument_types
            assert len(arguments) == len(kinds)
            for argument, kind in zip(arguments, kinds, strict=True):
                kind(argument)  # what ctypes would make of it
            self.calls.append(symbol.removeprefix(prefix))
            return getattr(self, f"_{name}")(tile, *arguments)

        return function

    def _linear_gelu(self, tile, x, x_row, weight, bias, z, h, rows, cols, inner, stream):
        sums = matrix(x, rows, inner, x_row).float() @ matrix(weight, cols, inner).float().t()
        sums = (sums + matrix(bias, 1, cols).float() if bias else sums).bfloat16()
        if z:
            matrix(z, rows, cols).copy_(sums)
        matrix(h, rows, cols).copy_(F.gelu(sums.float()))

    def _gelu_backward(
        self, tile, dy, dy_row, weight, z, dz, h, bias_sums, rows, cols, outer, stream
    ):
        kept = matrix(z, rows, cols).float()
        dh = matrix(dy, rows, outer, dy_row).float() @ matrix(weight, outer, cols).float()
        through = torch.ops.aten.gelu_backward(dh, kept)
        matrix(dz, rows, cols).copy_(through)
        if h:
            matrix(h, rows, cols).copy_(F.gelu(kept))
        if bias_sums:
            # Its tiles lie across: tile.rows features by tile.cols tokens.
            padded = -(-cols // tile.rows) * tile.rows
            tiles = -(-rows // tile.cols)
            sums = matrix(bias_sums, tiles, padded, dtype=torch.float32).fill_(NAN)
            for i in range(tiles):
                sums[i, :cols] = through[i * tile.cols : (i + 1) * tile.cols].sum(0)

    def _linear_scatter(
        self, tile, h, h_row, weight, bias, slots, out, out_row, rows, cols, inner, stream
    ):
        y = matrix(h, rows, inner, h_row).float() @ matrix(weight, cols, inner).float().t()
        y = y + matrix(bias, 1, cols).float() if bias else y
        memory = (ctypes.c_int32 * rows).from_address(slots)
        for row, slot in enumerate(memory):
            if slot >= 0:
                to = (ctypes.c_char * (cols * 2)).from_address(out + slot * out_row * 2)
                torch.frombuffer(to, dtype=torch.bfloat16).copy_(y[row])


@contextlib.contextmanager
def emulated(config):
    """The library as if a Hopper GPU were here and the tables named this config; yields it."""
    library = Emulated()

    def winner(name, dtype, size, device):
        return config[name] if isinstance(config, dict) else config

    with (
        mock.patch.object(_hopper, "load", lambda: library),
        mock.patch.object(_hopper, "runs_here", lambda like: True),
        mock.patch.object(_configs, "winner", winner),
    ):
        yield library
