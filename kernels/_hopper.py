"""GEMMs for Hopper whose epilogue does the pass behind them: an optional library, csrc/hopper_*.

Built on request (VLM_FAST_CUTLASS=1, see setup.py), free of Python and torch, loaded from the
package's folder. Config 0 of each is cuBLAS and a pass, and the only one where the library is
absent, the GPU is another, or a table (`_configs`) does not say that a tile is faster.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import _configs
from ._launcher import is_traced, on_device_of

R = TypeVar("R")

ABI = 1  # of csrc/hopper_gemm.h; it is in the functions' names
ALIGNMENT = 16  # bytes, of every row: what TMA asks for
CAPABILITY = (9, 0)
LIBRARY = _configs.PACKAGE / "_hopper.so"

TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64}
GEMMS: dict[str, Gemm] = {}


@dataclass(frozen=True, order=True)
class Tile:
    """Rows and columns of the result that a block of threads computes at a time."""

    rows: int
    cols: int
    schedule: str

    def options(self) -> dict[str, Any]:
        return {"rows": self.rows, "cols": self.cols, "schedule": self.schedule}


CUBLAS = Tile(0, 0, "cuBLAS and a pass")


class Gemm:
    """One function of the library in its tiles, and the choice between them and cuBLAS.

    Args:
        name: of the function, and in the tables.
        arguments: "p" for each pointer and "i" for each int64, in their order; the stream follows.
        tiles: of configs 1, 2, ...
    """

    def __init__(self, name: str, arguments: str, *tiles: Tile) -> None:
        self.name = name
        self.argument_types = [TYPES[kind] for kind in arguments + "p"]
        self.configs = (CUBLAS, *tiles)
        GEMMS[name] = self

    def symbol(self, config: int) -> str:
        return f"vlm_fast_v{ABI}_{self.name}_{config}"

    def __call__(
        self,
        like: Tensor,
        rows: int,
        widths: tuple[int, ...],
        plain: Callable[[], R],
        fused: Callable[[int], R],
    ) -> R:
        """``fused(config)`` or ``plain()``: the same results up to the order of summation.

        like: a tensor of the call's dtype and device; widths: the other sizes of the product.
        """
        config = self.choose(like, rows, widths)
        return fused(config) if config else plain()

    def choose(self, like: Tensor, rows: int, widths: tuple[int, ...]) -> int:
        """The config for this call: a pure function of its dtype, sizes and GPU."""
        if not self.serves(like, rows, widths):
            return 0
        index = _configs.winner(self.name, like.dtype, rows, like.device.index)
        return index if index < len(self.configs) else 0

    def serves(self, like: Tensor, rows: int, widths: tuple[int, ...]) -> bool:
        """Whether the library can take this call at all."""
        return (
            runs_here(like)
            and like.dtype is torch.bfloat16
            and rows > 0
            and all(width > 0 and width * 2 % ALIGNMENT == 0 for width in widths)
        )

    def launch(self, config: int, out: Tensor, *arguments: Tensor | int | None) -> None:
        """Call the library on the current stream; tensors are passed by their address."""
        if is_traced(out):
            return
        with on_device_of(out):
            stream = torch.cuda.current_stream(out.device).cuda_stream if out.is_cuda else 0
            error = self.function(config)(
                *(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), stream
            )
        if error is not None:
            raise RuntimeError(f"vlm_fast {self.name}, config {config}: {error.decode()}")

    def function(self, config: int) -> Callable[..., bytes | None]:
        return getattr(load(), self.symbol(config))


LINEAR_GELU = Gemm(
    "linear_gelu", "pippppiii", Tile(128, 128, "ping-pong"), Tile(64, 256, "ping-pong")
)
# Its result lies transposed: features are rows, tokens columns.
GELU_BACKWARD = Gemm(
    "gelu_backward", "pipppppiii", Tile(128, 128, "ping-pong"), Tile(64, 256, "ping-pong")
)
LINEAR_SCATTER = Gemm(
    "linear_scatter", "pippppiiii", Tile(128, 256, "cooperative"), Tile(128, 128, "ping-pong")
)


@functools.cache
def load() -> ctypes.CDLL:
    """The library; raises OSError where it is absent or of another version."""
    library = ctypes.CDLL(str(LIBRARY))
    for gemm in GEMMS.values():
        for config in range(1, len(gemm.configs)):
            try:
                function = getattr(library, gemm.symbol(config))
            except AttributeError:
                lack = f"{LIBRARY.name} lacks {gemm.symbol(config)}"
                raise OSError(f"{lack}: it was built from other sources") from None
            function.argtypes, function.restype = gemm.argument_types, ctypes.c_char_p
    return library


@functools.cache
def why_absent() -> str | None:
    """None, or why there is no library here."""
    if not LIBRARY.is_file():
        return "it was not built (VLM_FAST_CUTLASS=1)"
    try:
        load()
    except OSError as error:
        return str(error)
    return None


def runs_here(like: Tensor) -> bool:
    """Whether work on this tensor may go to the library."""
    return like.is_cuda and why_absent() is None and _is_hopper(like.device.index)


@functools.cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) == CAPABILITY


def linear_gelu(
    config: int, x: Tensor, weight: Tensor, bias: Tensor | None, *, keep_z: bool
) -> tuple[Tensor | None, Tensor]:
    """``z = x W^T + bias`` if it is to be kept, and ``gelu(z)``; x ``(rows, inner)``."""
    (rows, inner), cols = x.shape, weight.shape[0]
    h = x.new_empty(rows, cols)
    z = torch.empty_like(h) if keep_z else None
    x, weight = in_tma_rows(x), in_tma_rows(weight, contiguous=True)
    LINEAR_GELU.launch(
        config, h, x, x.stride(0), weight, aligned(bias), z, h, rows, cols, inner
    )  # fmt: skip
    return z, h


def gelu_backward(
    config: int, z: Tensor, dy: Tensor, weight: Tensor, *, want_h: bool, want_dbias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``dz = (dy W) gelu'(z)``, ``h = gelu(z)`` and the sum of dz over rows, if they are wanted.

    z ``(rows, cols)``, contiguous; dy ``(rows, outer)``; weight ``(outer, cols)``.
    """
    (rows, cols), outer = z.shape, weight.shape[0]
    features, tokens = GELU_BACKWARD.configs[config].rows, GELU_BACKWARD.configs[config].cols
    dz = torch.empty_like(z)
    h = torch.empty_like(z) if want_h else None
    sums = None
    if want_dbias:
        padded = -(-cols // features) * features
        sums = z.new_empty(-(-rows // tokens), padded, dtype=torch.float32)
    dy, weight = in_tma_rows(dy), in_tma_rows(weight, contiguous=True)
    GELU_BACKWARD.launch(
        config, dz, dy, dy.stride(0), weight, aligned(z), dz, h, sums, rows, cols, outer
    )  # fmt: skip
    return dz, h, None if sums is None else sums[:, :cols].sum(0).to(z.dtype)


def linear_scatter(
    config: int, h: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor, out: Tensor
) -> None:
    """``out[slots[i]] = h[i] W^T + bias``; a negative slot drops its row.

    h ``(rows, inner)``, slots int32 ``(rows,)``, out ``(*, cols)`` with dense rows, a fresh one.
    """
    (rows, inner), cols = h.shape, weight.shape[0]
    h, weight = in_tma_rows(h), in_tma_rows(weight, contiguous=True)
    LINEAR_SCATTER.launch(
        config, out, h, h.stride(0), weight, aligned(bias), slots.contiguous(), out, out.stride(0),
        rows, cols, inner,
    )  # fmt: skip


def in_tma_rows(x: Tensor, *, contiguous: bool = False) -> Tensor:
    """A matrix as TMA can read it, copied only where it is not: aligned, dense rows."""
    fits = x.is_contiguous() if contiguous else (
        x.stride(1) == 1 and x.stride(0) >= x.shape[1]
        and x.stride(0) * x.element_size() % ALIGNMENT == 0
    )  # fmt: skip
    return aligned(x) if fits else x.contiguous()


def aligned(x: Any) -> Any:
    """``x``, copied if it starts between the addresses that TMA takes."""
    if x is None or is_traced(x) or x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
