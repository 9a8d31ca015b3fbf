"""How a kernel is launched: its candidate configs, the device guard, and what tracing sees."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _configs
from ._triton import AVAILABLE, INTERPRETED

KERNELS: dict[str, Kernel] = {}


@dataclass(frozen=True)
class Config:
    """One way to tile a kernel: its block sizes (powers of two), warps and pipeline stages."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 3

    def options(self) -> dict[str, int]:
        return {
            **self.blocks,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # said, because Triton 3.10 changes the default
        }


@dataclass(frozen=True)
class Launch:
    """What one launch was given, or would have been: see `recording`."""

    kernel: Kernel
    arguments: dict[str, Any]
    size: int
    grid: Callable[[dict[str, int]], tuple[int, ...]]

    @property
    def dtype(self) -> torch.dtype:
        return next(a.dtype for a in self.arguments.values() if isinstance(a, Tensor))

    def programs(self, index: int) -> tuple[int, ...]:
        return self.grid(self.kernel.configs[index].blocks)

    def again(self, index: int) -> None:
        """Launch it with another config of its kernel."""
        options = self.kernel.configs[index].options()
        self.kernel.jit[self.programs(index)](*self.arguments.values(), **options)


class Kernel:
    """A Triton kernel and its at most eight configs; the first is the default.

    Called as ``kernel(size, grid, *arguments)``: ``size`` is the length of the axis the choice of
    config may depend on, ``grid`` a function of the config's blocks.
    """

    def __init__(self, jit: Any, configs: tuple[Config, ...]) -> None:
        self.jit, self.configs = jit, configs
        self.name: str = getattr(jit, "__name__", "absent")
        KERNELS[self.name] = self
        _configs.SOURCES[self.name] = self.source

    def __call__(
        self, size: int, grid: Callable[[dict[str, int]], tuple[int, ...]], *arguments: Any
    ) -> None:
        tensor = next(a for a in arguments if isinstance(a, Tensor))
        if _recordings:
            named = dict(zip(self.jit.arg_names, arguments, strict=False))
            for launches in tuple(_recordings.values()):
                launches.append(Launch(self, named, size, grid))
        if is_traced(tensor):
            return
        config = self.choose(tensor, size)
        programs = grid(config.blocks)
        if 0 in programs:
            return
        with on_device_of(tensor):
            self.jit[programs](*arguments, **config.options())

    def choose(self, tensor: Tensor, size: int) -> Config:
        """The config for this call: a pure function of kernel, dtype, size and GPU model."""
        if not tensor.is_cuda:
            return self.configs[0]
        index = _configs.winner(self.name, tensor.dtype, size, tensor.device.index)
        return self.configs[index if index < len(self.configs) else 0]

    def source(self) -> str:
        """A hash of the code, of what it calls, and of the configs: what a measured time is of."""
        code = getattr(self.jit, "cache_key", "interpreted")
        listed = [config.options() for config in self.configs]
        return hashlib.sha256(f"{code} {listed}".encode()).hexdigest()[:16]


def kernel(*configs: Config) -> Callable[[Any], Kernel]:
    """Declare the configs of the ``triton.jit`` function below."""
    if not 1 <= len(configs) <= 8:
        raise ValueError(f"a kernel lists 1 to 8 configs, got {len(configs)}")
    return lambda jit: Kernel(jit, configs)


def runs_triton(tensor: Tensor) -> bool:
    """Whether work on this tensor goes to Triton; if not, to the CPU's compiled code or ATen."""
    return AVAILABLE and (tensor.is_cuda or INTERPRETED)


def is_traced(tensor: Tensor) -> bool:
    """Whether this is a stand-in without data, for which only shapes are wanted."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


_recordings: dict[int, list[Launch]] = {}


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches. With fake tensors nothing runs: kernels compile from this without a GPU.

    Of the whole process: the backward of a GPU runs in a thread of autograd's own.
    """
    launches: list[Launch] = []
    _recordings[id(launches)] = launches
    try:
        yield launches
    finally:
        del _recordings[id(launches)]


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    # Triton launches on the current device, which need not be the tensor's.
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def precision() -> str:
    """Of products in fp32, as the user lets cuBLAS take them."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def in_rows(x: Tensor) -> Tensor:
    """``(batch, tokens, features)``, copied only if the strides are not those of rows."""
    x = dense(x)
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def dense(x: Tensor) -> Tensor:
    """x with a last stride of 1."""
    return x if x.stride(-1) == 1 else x.contiguous()
