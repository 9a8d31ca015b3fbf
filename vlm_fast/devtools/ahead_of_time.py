"""Every kernel compiled for GPUs that need not be here, and what the compiler made of it.

Nothing is listed: each op runs forward and backward at its bench shapes on CUDA tensors without
data, the launches are recorded, and Triton's own binder turns their arguments into signatures.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import vlm_fast.ops  # noqa: F401  declares what is compiled
from vlm_fast.devtools import sass
from vlm_fast.kernels._launcher import Config, Kernel, Launch, recording
from vlm_fast.kernels._triton import AVAILABLE, INTERPRETED, triton
from vlm_fast.ops.declaration import FLOATS, OPS, Op

if AVAILABLE:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITCallable, create_function_from_signature

ARCHS = ("sm_80", "sm_90", "sm_100")
BUDGETS = Path(__file__).resolve().parent / "budgets.json"
BUDGETS_TRITON = "3.6.0"  # by which they were counted; another compiler takes other registers
AT_MOST = ("registers", "shared_bytes")  # other budgets are of what there should be more of
DEFAULT_SHARED_BYTES = 48 * 1024  # leaves room for several blocks on a multiprocessor of any GPU
MAX_SHARED_BYTES = 227 * 1024  # all a block can have on sm_90 and sm_100


@dataclass(frozen=True)
class Resources:
    """What one kernel takes with one config; instructions as they stand in the code, not as run."""

    kernel: str
    signature: str
    config: int
    arch: str
    registers: int
    stack_bytes: int
    spills: int  # instructions on local memory
    shared_bytes: int
    tensor_core: int
    tma: int
    wide_loads: int  # of global memory, 128 bits or more
    wide_stores: int
    loads: int  # of global memory, however wide
    stores: int
    async_loads: int  # of 128 bits, from global to shared memory
    dots: int  # products of tiles, as the kernel says them
    seconds: float  # to compile; near 0 from Triton's cache

    def __str__(self) -> str:
        return f"{self.kernel} ({self.signature}), config {self.config}, on {self.arch}"


@dataclass(frozen=True)
class Build:
    """One kernel as Triton compiles it for a launch, with one of its configs, for one GPU."""

    kernel: Kernel
    signature: str
    config: int
    arch: str
    source: Any
    options: dict[str, Any]

    def compile(self) -> Any:
        return triton.compile(self.source, target=_target(self.arch), options=self.options)

    def ttir(self) -> str:
        """The kernel in Triton's first representation, inlined: the address arithmetic as meant."""
        return str(self.compile().asm["ttir"])


def compile_all(
    archs: Iterable[str] = ARCHS,
    *,
    ops: Iterable[str] | None = None,
    thorough: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Resources]:
    """Compile every kernel that the ops launch, with each of its configs, and count.

    Args:
        archs: "sm_80", "sm_90", "gfx942", ...
        ops: names; None is all of them.
        thorough: also in fp16, and with every config at every shape; else all shapes with the
            first config, and one launch in bf16 with each of the others.
        progress: called with how many builds are done, of how many.

    Raises:
        RuntimeError: Triton is absent or interpreting (TRITON_INTERPRET=1).
        ValueError: an arch or op is unknown.
    """
    return count(list(builds(archs, ops=ops, thorough=thorough)), progress)


def count(
    todo: Sequence[Build], progress: Callable[[int, int], None] | None = None
) -> list[Resources]:
    """Compile these, and count what they take: a row each, those of one arch together."""
    found = []
    by_arch: dict[str, list[tuple[Build, Any, float]]] = {}
    # Threads: ptxas is a process of its own, and Triton's passes release the interpreter lock.
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
    """No two threads of Triton's compiler parse Python at once.

    CPython before 3.12 counts the depth of a tree that it builds in one place for all threads. If
    the collector lets another thread run meanwhile, both raise SystemError.
    """
    lock, parse = threading.Lock(), JITCallable.parse

    def locked(function: Any) -> Any:
        with lock:
            return parse(function)

    with mock.patch.object(JITCallable, "parse", locked):
        yield


def violations(
    resources: Iterable[Resources],
    budgets: Mapping[str, Mapping[str, Mapping[str, int]]] | None = None,
) -> list[str]:
    """What exceeds the budgets, a sentence each: {kernel: {arch: {a count of Resources: bound}}}.

    No budget allows a spill. Of registers and shared memory it is the most a kernel may take; of
    instructions the least it must have in bf16 and fp16. None reads those of the package, which are
    of Triton `BUDGETS_TRITON`.
    """
    budgets = json.loads(BUDGETS.read_text()) if budgets is None else budgets
    found = []
    for r in resources:
        if r.stack_bytes or r.spills:
            found.append(f"{r}: spills ({r.stack_bytes} bytes of stack, {r.spills} instructions)")
        ceiling = MAX_SHARED_BYTES if r.config else DEFAULT_SHARED_BYTES
        if r.shared_bytes > ceiling:
            found.append(f"{r}: {r.shared_bytes} bytes of shared memory, at most {ceiling}")
        bounds = budgets.get(r.kernel, {}).get(r.arch)
        if bounds is None:
            found.append(f"{r.kernel} has no budget on {r.arch}")
            continue
        half = re.search(r"\b(bf16|fp16)\b", r.signature)
        for name, bound in bounds.items():
            value = getattr(r, name)
            if value > bound if name in AT_MOST else half and value < bound:
                limit = "at most" if name in AT_MOST else "at least"
                found.append(f"{r}: {name} {value}, {limit} {bound}")
    return list(dict.fromkeys(found))


def builds(
    archs: Iterable[str] = ARCHS, *, ops: Iterable[str] | None = None, thorough: bool = True
) -> Iterator[Build]:
    """What `compile_all` compiles: each different piece of code once."""
    if not AVAILABLE or INTERPRETED:
        reason = "is interpreting (TRITON_INTERPRET=1)" if AVAILABLE else "is not installed"
        raise RuntimeError(f"nothing can be compiled: Triton {reason}")
    names = list(OPS) if ops is None else list(ops)
    if unknown := [name for name in names if name not in OPS]:
        raise ValueError(f"no op is called {unknown[0]!r}; there are {', '.join(OPS)}")
    backends = {arch: _backend(arch) for arch in archs}
    dtypes = FLOATS if thorough else (torch.bfloat16, torch.float32)
    recorded = [launch for name in names for launch in launches(OPS[name], dtypes)]
    seen: set[Any] = set()
    for arch, backend in backends.items():
        met: set[Kernel] = set()
        for launch in recorded:
            for index in range(len(launch.kernel.configs)):
                if index and launch.kernel in met and not thorough:
                    break
                build = _build(launch, index, arch, backend)
                if (key := (arch, index, build.source.hash())) not in seen:
                    seen.add(key)
                    yield build
            met.add(launch.kernel)


def launches(op: Op[..., Any], dtypes: Sequence[torch.dtype] = FLOATS) -> list[Launch]:
    """What an op launches, without gradients and with: nothing is computed, no GPU needed.

    At every bench shape in every one of ``dtypes``; the words that its options take in the test
    shapes (which activation) at the first bench shape in bf16.
    """
    named = list(op.bench_shapes.values())
    cases = [(shape, dtype) for shape in named for dtype in dtypes]
    for shape in op.test_shapes:
        words = {k: v for k, v in shape.items() if k in op.defaults and isinstance(v, str)}
        if words:
            cases.append(({**named[0], **words}, torch.bfloat16))
    return [launch for shape, dtype in cases for launch in launches_at(op, shape, dtype)]


def launches_at(op: Op[..., Any], shape: Mapping[str, Any], dtype: torch.dtype) -> list[Launch]:
    """As `launches`, at one shape in one dtype."""
    with FakeTensorMode(), torch.no_grad(), recording() as found:
        values, settings = stand_ins(op, shape, dtype)
        op.fast(*values, **settings)
        if not op.returns_indices:
            with_gradients(op, values, settings)
    return found


def stand_ins(
    op: Op[..., Any], shape: Mapping[str, Any], dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and options of a shape, as if on a GPU; under a `FakeTensorMode`."""
    values, settings = op.sample(shape, dtype)
    return op._bind(tree_map_only(Tensor, _on_cuda, values), settings)


def with_gradients(
    op: Op[..., Any],
    values: tuple[Any, ...],
    settings: dict[str, Any],
    between: Callable[[], None] = lambda: None,
) -> None:
    """Forward for all gradients, what ``between`` does, and backward.

    Past autograd: in a CPU build of torch its engine knows no CUDA device, not even of stand-ins.
    """
    path, values = op._path, op.accepted(values, settings)
    count = path.count(values)
    needs = tuple(isinstance(v, Tensor) and v.is_floating_point() for v in path.flatten(values))
    result, kept = path.forward(path.needs_of(needs, count), *values, **settings)
    between()
    dy = [torch.empty_like(r) for r in ((result,) if path.single else result)]
    path.gradients(needs, count, kept, dy, settings)


def _on_cuda(tensor: Tensor) -> Tensor:
    """The same strides and offset, which decide how wide a load can be."""
    size = tensor.untyped_storage().nbytes() // tensor.itemsize
    storage = torch.empty(size, dtype=tensor.dtype, device="cuda")
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class _Address:
    """What Triton's binder asks of a tensor, for one in an allocation aligned as CUDA's are."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = int(tensor.storage_offset()) * tensor.itemsize
        self._size = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return self._offset

    def ptr_range(self) -> int:
        return self._size


def build_of(launch: Launch, arch: str, index: int = 0) -> Build:
    """What Triton would compile for a launch on a GPU, with one of the kernel's configs."""
    return _build(launch, index, arch, _backend(arch))


def _build(launch: Launch, index: int, arch: str, backend: Any) -> Build:
    jit, config = launch.kernel.jit, launch.kernel.configs[index]
    bind = create_function_from_signature(jit.signature, jit.params, backend)
    arguments = tree_map_only(Tensor, _Address, launch.arguments)
    bound = bind(**arguments, **config.options)
    options, *parts = jit._pack_args(backend, config.options, *bound)
    source = ASTSource(jit, *parts)
    signature = _describe(jit.params, source, config)
    return Build(launch.kernel, signature, index, arch, source, options.__dict__)


def _describe(params: Sequence[Any], source: Any, config: Config) -> str:
    """Pointers, constants, and the integers that are not plain i32."""
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
