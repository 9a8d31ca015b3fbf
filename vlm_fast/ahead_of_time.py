"""Every kernel compiled for GPUs that are not here, and what the compiler made of it.

Nothing is listed: each op runs forward and backward at its bench shapes on CUDA tensors without
data, the launches are recorded, and Triton's own binder turns their arguments into signatures.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import vlm_fast.ops  # noqa: F401  declares what is compiled
from vlm_fast.kernels._launcher import Config, Kernel, Launch, recording
from vlm_fast.kernels._triton import AVAILABLE, INTERPRETED, triton
from vlm_fast.op import FLOATS, OPS, Op

if AVAILABLE:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

ARCHS = ("sm_80", "sm_90", "sm_100")
MAX_SHARED_BYTES = 227 * 1024  # a block on sm_90 and sm_100
DEFAULT_SHARED_BYTES = 48 * 1024  # what every GPU has, several blocks a multiprocessor
SMALL_FLOATS = re.compile(r"\b(bf16|fp16)\b")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes with one config; instructions are counted in the code, not as run."""

    kernel: str
    signature: str
    config: int
    arch: str
    registers: int
    stack_bytes: int
    spills: int  # instructions that reach local memory
    shared_bytes: int
    tensor_core: int
    tma: int
    wide_loads: int  # global, 128 bits or more
    wide_stores: int
    seconds: float  # near 0 from Triton's cache

    def __str__(self) -> str:
        return f"{self.kernel} ({self.signature}) config {self.config} on {self.arch}"


@dataclass(frozen=True)
class Build:
    """One kernel as Triton compiles it for a launch, with one of its configs, for one GPU."""

    kernel: Kernel
    config: int
    arch: str
    signature: str
    source: Any
    options: dict[str, Any]

    def compile(self) -> Any:
        return triton.compile(self.source, target=_target(self.arch), options=self.options)


def compile_all(
    archs: Sequence[str] = ARCHS,
    *,
    ops: Iterable[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Resources]:
    """Compile every kernel that the ops launch, with each config, and count.

    Args:
        archs: "sm_80", "sm_90", "gfx942", ...
        ops: names; None is all of them.
        progress: called with how many builds are done, of how many.

    Raises:
        RuntimeError: Triton is absent or interpreting (TRITON_INTERPRET=1).
        ValueError: an arch or op is unknown.
    """
    todo = list(builds(archs, ops=ops))
    found = []
    # Threads: ptxas is a process of its own, and Triton's passes release the interpreter lock.
    with ThreadPoolExecutor(2) as pool:
        for resources in pool.map(measure, todo):
            found.append(resources)
            if progress is not None:
                progress(len(found), len(todo))
    return found


def builds(archs: Sequence[str] = ARCHS, *, ops: Iterable[str] | None = None) -> Iterator[Build]:
    """What `compile_all` compiles, each different piece of code once."""
    if not AVAILABLE or INTERPRETED:
        reason = "is not installed" if not AVAILABLE else "interprets (TRITON_INTERPRET=1)"
        raise RuntimeError(f"nothing can be compiled: Triton {reason}")
    names = list(OPS) if ops is None else list(ops)
    if unknown := [name for name in names if name not in OPS]:
        raise ValueError(f"no op is called {unknown[0]!r}; there are {', '.join(OPS)}")
    recorded = [launch for name in names for launch in launches(OPS[name])]
    seen = set()
    for arch in archs:
        backend = make_backend(_target(arch))
        for launch in recorded:
            for index, config in enumerate(launch.kernel.configs):
                build = _build(launch, index, config, arch, backend)
                key = (arch, index, build.source.hash())
                if key not in seen:
                    seen.add(key)
                    yield build


def launches(op: Op[..., Any]) -> list[Launch]:
    """What an op launches at its bench shapes: without gradients, and forward and backward."""
    with FakeTensorMode(), torch.no_grad(), recording() as found:
        for shape in op.bench_shapes.values():
            for dtype in FLOATS:
                values, settings = op.sample(shape, dtype)
                values = tree_map_only(Tensor, _on_cuda, values)
                op.fast(*values, **settings)
                _with_gradients(op, *op._bind(values, settings))
    return found


def _with_gradients(op: Op[..., Any], values: tuple[Any, ...], settings: dict[str, Any]) -> None:
    # Not by autograd, which knows no CUDA device in a CPU build of torch, with data or without.
    path, values = op._path, op._accepts(*values, **settings)
    count = path.count(values)
    needs = tuple(isinstance(v, Tensor) and v.is_floating_point() for v in path.flatten(values))
    result, kept = path.forward(path.needs_of(needs, count), *values, **settings)
    dy = [torch.empty_like(r) for r in ((result,) if path.single else result)]
    path.gradients(needs, count, kept, dy, settings)


def _on_cuda(tensor: Tensor) -> Tensor:
    """The same strides and offset: they decide how wide loads can be."""
    size = tensor.untyped_storage().nbytes() // tensor.itemsize
    storage = torch.empty(size, dtype=tensor.dtype, device="cuda")
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class _Address:
    """A tensor as Triton's binder sees it, in an allocation that is aligned as CUDA's are."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = tensor.storage_offset() * tensor.itemsize
        self._nbytes = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return self._offset

    def ptr_range(self) -> int:
        return self._nbytes


def _build(launch: Launch, index: int, config: Config, arch: str, backend: Any) -> Build:
    jit = launch.kernel.jit
    bind = create_function_from_signature(jit.signature, jit.params, backend)
    arguments = tree_map_only(Tensor, _Address, launch.arguments)
    bound = bind(**arguments, **config.options())
    options, signature, constants, attributes = jit._pack_args(backend, config.options(), *bound)
    source = ASTSource(jit, signature, constants, attributes)
    described = _describe(jit.params, source, config)
    return Build(launch.kernel, index, arch, described, source, options.__dict__)


def _describe(params: Sequence[Any], source: Any, config: Config) -> str:
    """Pointers, constants, and the integers that are not plain aligned i32."""
    words = []
    for i, param in enumerate(params):
        kind = source.signature[param.name]
        if kind == "constexpr":
            text = source.constants[(i,)]
        else:
            aligned = param.do_not_specialize or source.attrs.get((i,)) or kind.startswith("fp")
            text = kind.removeprefix("*") + ("" if aligned else " unaligned")
        if text is not None and text != "i32" and param.name not in config.blocks:
            words.append(f"{param.name.removesuffix('_ptr')} {text}")
    return ", ".join(words)


def _target(arch: str) -> Any:
    if match := re.fullmatch(r"sm_(\d+)", arch):
        return GPUTarget("cuda", int(match[1]), 32)
    if match := re.fullmatch(r"gfx(\d+)[0-9a-f]{2}", arch):
        return GPUTarget("hip", arch, 64 if match[1] == "9" else 32)
    raise ValueError(f"arch must be like 'sm_90' or 'gfx942', got {arch!r}")


def measure(build: Build) -> Resources:
    """Compile, and read registers and instructions from the machine code."""
    start = time.perf_counter()
    compiled = build.compile()
    seconds = time.perf_counter() - start
    amd = "amdgcn" in compiled.asm
    counts = _amd(compiled.asm["amdgcn"]) if amd else _nvidia(compiled.asm["cubin"])
    return Resources(
        build.kernel.name, build.signature, build.config, build.arch,
        shared_bytes=compiled.metadata.shared, seconds=round(seconds, 2), **counts,
    )  # fmt: skip


def _nvidia(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tools = triton.knobs.nvidia
        usage = _output(tools.cuobjdump.path, "-res-usage", file.name)
        code = _output(tools.nvdisasm.path, "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    return dict(
        registers=registers,
        stack_bytes=stack,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        tensor_core=len(re.findall(r"\b(?:UTC)?[A-Z]G?MMA\b", code)),
        tma=len(re.findall(r"\bUTMA(?:LDG|STG|REDG)\b", code)),
        wide_loads=len(re.findall(r"\bLDG\.[.\w]*\b(?:128|256)\b", code)),
        wide_stores=len(re.findall(r"\bSTG\.[.\w]*\b(?:128|256)\b", code)),
    )


def _amd(code: str) -> dict[str, int]:
    def noted(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", code)
        return int(match[1]) if match else 0

    return dict(
        registers=noted("vgpr_count"),
        stack_bytes=noted("private_segment_fixed_size"),
        spills=noted("vgpr_spill_count") + noted("sgpr_spill_count"),
        tensor_core=len(re.findall(r"\bv_(?:mfma|wmma)_", code)),
        tma=0,
        wide_loads=len(re.findall(r"\b(?:global|buffer)_load_(?:dwordx4|b128)\b", code)),
        wide_stores=len(re.findall(r"\b(?:global|buffer)_store_(?:dwordx4|b128)\b", code)),
    )


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
