"""Launching of Triton kernels: block sizes, the current device, and recording of launches."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._fast_launch import Recipe, make_launcher, recipe
from ._triton import AVAILABLE, INTERPRETED

KERNELS: dict[str, Kernel] = {}
Grid = Callable[[dict[str, int]], tuple[int, ...]]


@dataclass(frozen=True)
class Config:
    """Block sizes of a kernel (powers of two), its warps and its pipeline stages.

    With ``asserts``, the kernel's ``assert`` statements are compiled; otherwise they are omitted.
    ``registers`` is the most that a thread may have. Without it ptxas aims at a number with which
    more programs run at once, such as 128, and spills a few to reach it.
    """

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 3
    asserts: bool = False
    registers: int | None = None

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        options = {
            **self.blocks,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # explicit, because Triton 3.10 changes the default
        }
        if self.asserts:  # those of the kernel, without one for every sum of integers
            options |= {"debug": True, "sanitize_overflow": False}
        if self.registers and torch.version.hip is None:  # ROCm does not know it
            options["maxnreg"] = self.registers
        return options

    def on(self, backend: str) -> Config:
        """The config for a backend of Triton: only CUDA bounds the registers."""
        return self if backend == "cuda" else replace(self, registers=None)


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its arguments by name, its grid and its config's number."""

    kernel: Kernel
    arguments: dict[str, Any]
    grid: Grid
    config: int = 0

    def programs(self, config: int = 0) -> tuple[int, ...]:
        """The grid with one of the kernel's configs."""
        return self.grid(self.kernel.configs[config].blocks)


class Kernel:
    """A Triton kernel with its config, launched by ``kernel(grid, *arguments)``.

    ``grid`` maps the block sizes to the number of programs. A kernel may have several configs:
    ``choose`` then maps the ``size`` of a call to the index of a config, or the call names the
    ``config``. If configs are ``exclusive``, a call can run with that one only; with others its
    registers might spill.

    Attributes:
        launch: launches with a config; Triton's own launch until it has compiled a kernel, then a
            launcher of `_fast_launch`.
    """

    def __init__(
        self,
        jit: Any,
        configs: tuple[Config, ...],
        choose: Callable[[int], int] | None = None,
        exclusive: bool = False,
    ) -> None:
        self.jit, self.configs, self.choose, self.exclusive = jit, configs, choose, exclusive
        self.name: str = getattr(jit, "__name__", "absent")
        self.launch: Callable[..., Any] = self.launch_by_triton
        KERNELS[self.name] = self

    def __call__(self, grid: Grid, *arguments: Any, size: int = 0, config: int = 0) -> None:
        self.launch(config if self.choose is None else self.choose(size), grid, *arguments)

    def launch_by_triton(self, config: int, grid: Grid, *arguments: Any) -> Recipe | None:
        """Record the launch if asked for, and run it unless the tensors are traced.

        Returns:
            What launches the compiled kernel again, if anything but Triton can.
        """
        for tensor in arguments:
            if isinstance(tensor, Tensor):
                break
        if _recordings:
            named = dict(zip(self.jit.arg_names, arguments, strict=False))
            for launches in tuple(_recordings.values()):
                launches.append(Launch(self, named, grid, config))
        if is_traced(tensor):
            return None
        chosen = self.configs[config]
        programs = grid(chosen.blocks)
        if 0 in programs:
            return None
        # Triton launches on the current device, which need not be the tensor's.
        with on_device_of(tensor):
            compiled = self.jit[programs](*arguments, **chosen.options)
        if INTERPRETED:
            return None
        if self.launch == self.launch_by_triton:
            blocks = tuple(config.blocks for config in self.configs)
            self.launch = make_launcher(self.launch_by_triton, self.jit, blocks, _recordings)
        return recipe(compiled, arguments, self.jit)


def kernel(
    *configs: Config, choose: Callable[[int], int] | None = None, exclusive: bool = False
) -> Callable[[Any], Kernel]:
    """Decorator that makes a ``triton.jit`` function a `Kernel` with these configs."""
    return lambda jit: Kernel(jit, configs, choose, exclusive)


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton computes on this tensor. If not, the compiled CPU extension or ATen does."""
    return AVAILABLE and (tensor.is_cuda or INTERPRETED)


def is_traced(tensor: Tensor) -> bool:
    """Whether this is a fake or meta tensor, for which only shapes are computed."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def capability(tensor: Tensor) -> int:
    """The compute capability of the tensor's GPU as a number, 90 for 9.0."""
    if tensor.is_cuda and not is_traced(tensor):
        return _capability(tensor.device.index)
    return _assumed[0]


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


_assumed = [90]


@contextlib.contextmanager
def assume_capability(number: int) -> Iterator[None]:
    """Record launches as for this GPU where there is none."""
    before = _assumed[0]
    _assumed[0] = number
    try:
        yield
    finally:
        _assumed[0] = before


_recordings: dict[int, list[Launch]] = {}


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches of all threads, because autograd runs a GPU's backward in its own.

    With fake tensors nothing runs, and the recorded launches suffice to compile without a GPU.
    """
    launches: list[Launch] = []
    _recordings[id(launches)] = launches
    try:
        yield launches
    finally:
        del _recordings[id(launches)]


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which the tensor's device is the current one."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` of products, which matters in fp32: the user's for cuBLAS."""
    is_tf32 = dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if is_tf32 else "ieee"


def in_rows(x: Tensor) -> Tensor:
    """x as ``(batch, tokens, features)`` with a last stride of 1, copied only if necessary."""
    x = dense(x)
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def dense(x: Tensor) -> Tensor:
    """x with a last stride of 1, copied only if necessary."""
    return x if x.stride(-1) == 1 else x.contiguous()
