"""Compile every kernel for GPU architectures that need not be present, and count its resources.

There is no list of kernels. Each op runs forward and backward at its benchmark shapes on fake CUDA
tensors, the kernel launches are recorded, and Triton's own binder turns their arguments into
signatures to compile.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import vlm_fast.ops  # noqa: F401  declares what is compiled
from vlm_fast.devtools import sass
from vlm_fast.devtools.fake_runs import fake_arguments, run_with_gradients
from vlm_fast.kernels._launcher import Config, Kernel, Launch, assume_capability, recording
from vlm_fast.kernels._triton import AVAILABLE, INTERPRETED, triton
from vlm_fast.ops.declaration import FLOATS, OPS, Op

if AVAILABLE:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITCallable, create_function_from_signature

ARCHS = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses with one config.

    Instruction counts are static: instructions in the code, not instructions executed.

    Attributes:
        kernel: name of the kernel.
        signature: pointer types, constants and integer types that it was compiled for.
        config: index into the kernel's configs; 0 is the default.
        arch: such as "sm_90".
        registers: per thread.
        stack_bytes: per thread, in local memory.
        spills: instructions that access local memory.
        shared_bytes: per block.
        tensor_core: matrix multiply-accumulate instructions.
        tma: bulk copies by the tensor memory accelerator.
        wide_loads, wide_stores: accesses to global memory of 128 bits or more.
        loads, stores: all accesses to global memory.
        async_loads: asynchronous copies of 128 bits from global to shared memory.
        dots: ``tl.dot`` operations in the kernel's Triton IR.
        seconds: time to compile; close to 0 if Triton's cache held the binary.
    """

    kernel: str
    signature: str
    config: int
    arch: str
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    tensor_core: int
    tma: int
    wide_loads: int
    wide_stores: int
    loads: int
    stores: int
    async_loads: int
    dots: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.kernel} ({self.signature}), config {self.config}, on {self.arch}"


@dataclass(frozen=True)
class Build:
    """One compilation: a kernel, the signature of one launch, a config and an architecture."""

    kernel: Kernel
    signature: str
    config: int
    arch: str
    source: Any
    options: dict[str, Any]

    def compile(self) -> Any:
        return triton.compile(self.source, target=_target(self.arch), options=self.options)

    def ttir(self) -> str:
        """The kernel in Triton's first intermediate representation, with all functions inlined."""
        return str(self.compile().asm["ttir"])


def compile_all(
    archs: Iterable[str] = ARCHS,
    *,
    ops: Iterable[str] | None = None,
    thorough: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Resources]:
    """Compile every kernel that the ops launch, with each of its configs, and count resources.

    Args:
        archs: architectures such as "sm_80", "sm_90", "gfx942".
        ops: names of ops; None means all of them.
        thorough: if True, also compile for fp16, and every config at every shape. If False, compile
            the default config at every shape, and each other config for one launch in bf16. Of
            exclusive configs those that are chosen are compiled.
        progress: called with the number of finished builds and the number of all builds.

    Returns:
        One `Resources` per different compilation, grouped by architecture.

    Raises:
        RuntimeError: Triton is absent or interpreting (TRITON_INTERPRET=1).
        ValueError: an arch or op is unknown.
    """
    return count(list(builds(archs, ops=ops, thorough=thorough)), progress)


def count(
    todo: Sequence[Build], progress: Callable[[int, int], None] | None = None
) -> list[Resources]:
    """Compile ``todo`` and count resources: one row per build, grouped by architecture."""
    found = []
    by_arch: dict[str, list[tuple[Build, Any, float]]] = {}
    # Threads help because ptxas is a separate process and Triton's passes release the GIL.
    with _one_parse_at_a_time(), ThreadPoolExecutor(2) as pool:
        for done, timed in enumerate(pool.map(_timed, todo), start=1):
            by_arch.setdefault(timed[0].arch, []).append(timed)
            if progress is not None:
                progress(done, len(todo))
    for arch, group in by_arch.items():
        counts = sass.inspect([compiled.asm for _, compiled, _ in group], arch)
        for (build, compiled, seconds), counted in zip(group, counts, strict=True):
            found.append(
                Resources(
                    build.kernel.name,
                    build.signature,
                    build.config,
                    arch,
                    seconds=seconds,
                    shared_bytes=compiled.metadata.shared,
                    dots=len(re.findall(r"\btt\.dot\b", compiled.asm["ttir"])),
                    **counted,
                )
            )
    return found


@contextlib.contextmanager
def _one_parse_at_a_time() -> Iterator[None]:
    """Let only one thread at a time parse Python source in Triton's compiler.

    Before 3.12, CPython's parser keeps its recursion depth in a variable shared by all threads. If
    the garbage collector switches threads during a parse, both threads raise SystemError.
    """
    lock, parse = threading.Lock(), JITCallable.parse

    def locked(function: Any) -> Any:
        with lock:
            return parse(function)

    with mock.patch.object(JITCallable, "parse", locked):
        yield


def builds(
    archs: Iterable[str] = ARCHS, *, ops: Iterable[str] | None = None, thorough: bool = True
) -> Iterator[Build]:
    """The builds that `compile_all` compiles, without duplicates.

    Raises:
        RuntimeError: Triton is absent or interpreting (TRITON_INTERPRET=1).
        ValueError: an arch or op is unknown.
    """
    if not AVAILABLE or INTERPRETED:
        reason = "is interpreting (TRITON_INTERPRET=1)" if AVAILABLE else "is not installed"
        raise RuntimeError(f"nothing can be compiled: Triton {reason}")
    names = list(OPS) if ops is None else list(ops)
    if unknown := [name for name in names if name not in OPS]:
        raise ValueError(f"no op is called {unknown[0]!r}; there are {', '.join(OPS)}")
    backends = {arch: _backend(arch) for arch in archs}
    dtypes = FLOATS if thorough else (torch.bfloat16, torch.float32)
    seen: set[Any] = set()
    for arch, backend in backends.items():
        met: set[Kernel] = set()
        with assume_capability(backend.target.arch if backend.target.backend == "cuda" else 80):
            recorded = [launch for name in names for launch in launches(OPS[name], dtypes)]
        for launch in recorded:
            count = len(launch.kernel.configs) if thorough or launch.kernel not in met else 1
            for index in (launch.config,) if launch.kernel.exclusive else range(count):
                build = _build(launch, index, arch, backend)
                if (key := (arch, index, build.source.hash())) not in seen:
                    seen.add(key)
                    yield build
            met.add(launch.kernel)


def launches(op: Op[..., Any], dtypes: Sequence[torch.dtype] = FLOATS) -> list[Launch]:
    """The kernel launches of an op, without and with gradients. Needs no GPU.

    They are recorded at every bench shape in every one of ``dtypes``. String options that only the
    test shapes use, such as other activations, are recorded at the first bench shape in bf16.
    """
    named = list(op.bench_shapes.values())
    cases = [(shape, dtype) for shape in named for dtype in dtypes]
    for shape in op.test_shapes:
        words = {k: v for k, v in shape.items() if k in op.defaults and isinstance(v, str)}
        if words:
            cases.append(({**named[0], **words}, torch.bfloat16))
    return [launch for shape, dtype in cases for launch in launches_at(op, shape, dtype)]


def launches_at(op: Op[..., Any], shape: Mapping[str, Any], dtype: torch.dtype) -> list[Launch]:
    """The kernel launches of an op at one shape in one dtype, without and with gradients."""
    with FakeTensorMode(), torch.no_grad(), recording() as found:
        values, settings = fake_arguments(op, shape, dtype)
        op.fast(*values, **settings)
        if not op.returns_indices:
            run_with_gradients(op, values, settings)
    return found


class _Address:
    """The tensor attributes that Triton's binder reads, for an allocation aligned like CUDA's."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = int(tensor.storage_offset()) * tensor.itemsize
        self._size = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return self._offset

    def ptr_range(self) -> int:
        return self._size


def build_of(launch: Launch, arch: str, index: int = 0) -> Build:
    """The build that Triton would make for a launch on ``arch`` with config number ``index``."""
    return _build(launch, index, arch, _backend(arch))


def _build(launch: Launch, index: int, arch: str, backend: Any) -> Build:
    jit, config = launch.kernel.jit, launch.kernel.configs[index].on(backend.target.backend)
    bind = create_function_from_signature(jit.signature, jit.params, backend)
    arguments = tree_map_only(Tensor, _Address, launch.arguments)
    bound = bind(**arguments, **config.options)
    options, *parts = jit._pack_args(backend, config.options, *bound)
    source = ASTSource(jit, *parts)
    signature = _describe(jit.params, source, config)
    return Build(launch.kernel, signature, index, arch, source, options.__dict__)


def _describe(params: Sequence[Any], source: Any, config: Config) -> str:
    """Name the pointer types, the constants, and the integers that are not plain i32."""
    words = []
    for i, param in enumerate(params):
        kind = source.signature[param.name]
        if kind == "constexpr":
            text = source.constants[(i,)]
        else:
            known = source.attrs.get((i,)) or param.do_not_specialize or kind.startswith("fp")
            text = kind.removeprefix("*") + ("" if known else " unaligned")
        if text is not None and text != "i32" and param.name not in config.blocks:
            words.append(f"{param.name.removesuffix('_ptr')} {text}")
    return ", ".join(words)


@functools.cache
def _backend(arch: str) -> Any:
    return make_backend(_target(arch))


def _target(arch: str) -> Any:
    if match := re.fullmatch(r"sm_(\d+)", arch):
        return GPUTarget("cuda", int(match[1]), 32)
    if match := re.fullmatch(r"gfx(\d+)[0-9a-f]{2}", arch):
        return GPUTarget("hip", arch, 64 if match[1] == "9" else 32)
    raise ValueError(f"arch must be like 'sm_90' or 'gfx942', got {arch!r}")


def _timed(build: Build) -> tuple[Build, Any, float]:
    start = time.perf_counter()
    compiled = build.compile()
    return build, compiled, round(time.perf_counter() - start, 2)
