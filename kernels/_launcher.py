"""How a Triton kernel is launched: its block sizes, the device guard, and recorded launches."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._triton import AVAILABLE, INTERPRETED

KERNELS: dict[str, Kernel] = {}
Grid = Callable[[dict[str, int]], tuple[int, ...]]


@dataclass(frozen=True)
class Config:
    """How a kernel is tiled: its block sizes (powers of two), warps and pipeline stages."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 3

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {
            **self.blocks,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # explicit, because Triton 3.10 changes the default
        }


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its arguments by name, and its grid."""

    kernel: Kernel
    arguments: dict[str, Any]
    grid: Grid

    def programs(self, config: int = 0) -> tuple[int, ...]:
        """The grid with one of the kernel's configs."""
        return self.grid(self.kernel.configs[config].blocks)


class Kernel:
    """A Triton kernel with its config; called as ``kernel(grid, *arguments)``.

    ``grid`` is a function of the config's blocks. A kernel may have a second config for some sizes:
    ``choose`` then maps the ``size`` of a call to the index of a config.
    """

    def __init__(
        self, jit: Any, configs: tuple[Config, ...], choose: Callable[[int], int] | None = None
    ) -> None:
        self.jit, self.configs, self.choose = jit, configs, choose
        self.name: str = getattr(jit, "__name__", "absent")
        KERNELS[self.name] = self

    def __call__(self, grid: Grid, *arguments: Any, size: int = 0) -> None:
        for tensor in arguments:
            if isinstance(tensor, Tensor):
                break
        if _recordings:
            named = dict(zip(self.jit.arg_names, arguments, strict=False))
            for launches in tuple(_recordings.values()):
                launches.append(Launch(self, named, grid))
        if is_traced(tensor):
            return
        config = self.configs[0 if self.choose is None else self.choose(size)]
        programs = grid(config.blocks)
        if 0 in programs:
            return
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            # Triton launches on the current device, which need not be the tensor's.
            with torch.cuda.device(tensor.device):
                self.jit[programs](*arguments, **config.options)
        else:
            self.jit[programs](*arguments, **config.options)


def kernel(*configs: Config, choose: Callable[[int], int] | None = None) -> Callable[[Any], Kernel]:
    """Give the ``triton.jit`` function below its config, or several and how to choose by size."""
    return lambda jit: Kernel(jit, configs, choose)


def runs_triton(tensor: Tensor) -> bool:
    """Whether work on this tensor goes to Triton; if not, to the CPU's compiled code or ATen."""
    return AVAILABLE and (tensor.is_cuda or INTERPRETED)


def is_traced(tensor: Tensor) -> bool:
    """Whether this is a fake or meta tensor: only shapes are wanted, nothing is computed."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


_recordings: dict[int, list[Launch]] = {}


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches of the whole process: autograd runs a GPU's backward in its own thread.

    With fake tensors nothing runs; what is recorded then suffices to compile without a GPU.
    """
    launches: list[Launch] = []
    _recordings[id(launches)] = launches
    try:
        yield launches
    finally:
        del _recordings[id(launches)]


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device the current one."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def precision() -> str:
    """Triton's precision of fp32 products, as the user lets cuBLAS take them."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def in_rows(x: Tensor) -> Tensor:
    """``(batch, tokens, features)``, copied only if the strides are not those of rows."""
    x = dense(x)
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def dense(x: Tensor) -> Tensor:
    """x with a last stride of 1."""
    return x if x.stride(-1) == 1 else x.contiguous()
