"""Launches of kernels that Triton has compiled before, without Triton's binder.

A launcher is called as ``launcher(config, grid, *arguments)``. It makes a key of the arguments that
is equal for two calls exactly if Triton would run the same compiled kernel. A known key is launched
at once. For any other call it calls ``slow``, Triton's own launch, whose result it remembers.

There are two: `csrc/launch.c`, which is built when the package is installed or else by Triton's own
builder, and `PythonLauncher` where there is no C compiler.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._host import host
from ._triton import tl, triton

SPECIALIZE, ALIGN, CONSTANT = 1, 2, 4  # flags of an argument, as in csrc/launch_key.h
MAX_ARGUMENTS, MAX_ENTRIES = 128, 4096
CUDA = 2  # DLPack's number
PARAMETER_TYPES = {"i1", "i8", "i16", "i32", "i64", "u1", "u8", "u16", "u32", "u64", "fp32"}

Launcher = Callable[..., None]


class Recipe(NamedTuple):
    """What a launch of a compiled kernel needs.

    Attributes:
        function: the driver's handle.
        threads: of a block.
        shared: bytes of shared memory.
        sources: for each parameter of the compiled kernel, the number of the argument it takes.
        compiled: Triton's ``CompiledKernel``, which unloads the function when it is freed.
    """

    function: int
    threads: int
    shared: int
    sources: bytes
    compiled: Any


def recipe(compiled: Any, arguments: tuple[Any, ...], jit: Any) -> Recipe | None:
    """What launches this compiled kernel; None if only Triton's own launch serves it.

    That is so for clusters, cooperative and dependent launches, scratch memory, tensor descriptors
    and other arguments by value than integers, bools and fp32. A kernel may use global constants;
    Triton would raise if one had another value than when it was compiled.
    """
    constants = [value for value, _ in jit.used_global_vals.values()]
    if compiled is None or not all(isinstance(value, tl.constexpr) for value in constants):
        return None
    metadata = compiled.metadata
    if (
        metadata.num_ctas != 1
        or getattr(metadata, "launch_cooperative_grid", False)
        or getattr(metadata, "launch_pdl", False)
        or getattr(metadata, "global_scratch_size", 0)
        or getattr(metadata, "profile_scratch_size", 0)
        or getattr(metadata, "tensordesc_meta", None)
    ):
        return None
    sources = []
    for i, kind in enumerate(compiled.src.signature.values()):
        if kind == "constexpr":
            continue
        if not isinstance(kind, str) or not (kind[0] == "*" or kind in PARAMETER_TYPES):
            return None
        if i >= len(arguments):
            return None
        sources.append(i)
    warps, _, shared = compiled.packed_metadata
    return Recipe(compiled.function, 32 * warps, shared, bytes(sources), compiled)


def make_launcher(
    slow: Callable[..., Recipe | None],
    jit: Any,
    blocks: tuple[dict[str, int], ...],
    recordings: dict[Any, Any],
) -> Launcher:
    """The fastest launcher that this installation has, or ``slow`` itself.

    Args:
        slow: ``slow(config, grid, *arguments)`` launches by Triton.
        jit: Triton's function.
        blocks: the block sizes of each config; the last parameters of the function.
        recordings: while it is not empty, every call goes to ``slow``.
    """
    flags = argument_flags(jit, set(blocks[0]))
    idle = (recordings, *_settings(jit))
    backend = triton.runtime.driver.active.get_current_target().backend
    wanted = os.environ.get("VLM_FAST_LAUNCHER", "c")
    knobs = triton.knobs
    if flags is None or wanted == "triton" or knobs.runtime.debug:
        return slow
    if getattr(knobs.compilation, "instrumentation_mode", ""):
        return slow
    if wanted == "c" and backend == "cuda":
        module = host.launching_on(CUDA)
        if module is not None:
            launcher: Launcher = module.Launcher(slow, flags, blocks, idle)
            return launcher
    return PythonLauncher(slow, flags, blocks, idle)


def argument_flags(jit: Any, block_names: set[str]) -> bytes | None:
    """How Triton specialises each argument; None if a launcher cannot know."""
    parameters = [p for p in jit.params if p.name not in block_names]
    if jit.params[: len(parameters)] != parameters or len(parameters) > MAX_ARGUMENTS:
        return None
    if any(p.annotation_type and not p.is_constexpr for p in parameters):
        return None
    return bytes(
        (CONSTANT if p.is_constexpr else 0)
        | (0 if p.do_not_specialize else SPECIALIZE)
        | (0 if p.do_not_specialize_on_alignment else ALIGN)
        for p in parameters
    )


def _settings(jit: Any) -> tuple[Any, ...]:
    """Dicts and lists that are empty while no hook and no setting of Triton changes a launch."""
    knobs = triton.knobs
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return (
        vars(knobs.runtime),
        vars(knobs.compilation),
        jit.pre_run_hooks,
        *[hook.calls for hook in hooks if hook is not None],
    )


class PythonLauncher:
    """A launcher without compiled code, which calls ``CompiledKernel.run``.

    Args:
        slow: as in `make_launcher`.
        flags: `argument_flags`.
        blocks: the block sizes of each config.
        idle: dicts and lists that are empty while a call may be launched.
    """

    def __init__(
        self,
        slow: Callable[..., Recipe | None],
        flags: bytes,
        blocks: tuple[dict[str, int], ...],
        idle: tuple[Any, ...],
    ) -> None:
        self.slow, self.flags, self.blocks, self.idle = slow, flags, blocks, idle
        # By the types of the arguments: what makes a key, and the known kernels by key.
        self.known: dict[tuple[type, ...], tuple[Callable[..., Any], dict[Any, Any]]] = {}
        active = triton.runtime.driver.active
        self.current_device = active.get_current_device
        self.current_stream = active.get_current_stream

    def _of_types(self, types: tuple[type, ...]) -> tuple[Callable[..., Any], dict[Any, Any]]:
        found = self.known.get(types)
        if found is None:
            plain = _without_parameters(types)
            found = self.known.get(plain) or (key_function(plain, self.flags), {})
            self.known[types] = self.known[plain] = found
        return found

    def key(self, config: int, *arguments: Any) -> Any:
        """What distinguishes the compiled kernels; None if the slow call must serve."""
        types = tuple(map(type, arguments))
        key = self._of_types(types)[0](config, self.current_device(), *arguments)
        return None if key is None else (_without_parameters(types), key)

    def __call__(self, config: int, grid: Callable[..., tuple[int, ...]], *arguments: Any) -> None:
        key = None
        if not any(self.idle):
            make_key, kernels = self._of_types(tuple(map(type, arguments)))
            device = self.current_device()
            key = make_key(config, device, *arguments)
            found = kernels.get(key)
            if found is not None:
                x, y, z, *_ = *grid(self.blocks[config]), 1, 1
                if x and y and z:
                    compiled, constants = found
                    compiled.run(
                        x, y, z, self.current_stream(device), compiled.function,
                        compiled.packed_metadata, None, None, None, *arguments, *constants,
                    )  # fmt: skip
                return
        made = self.slow(config, grid, *arguments)
        if made is not None and key is not None and len(kernels) < MAX_ENTRIES:
            kernels[key] = made.compiled, tuple(self.blocks[config].values())


def _without_parameters(types: tuple[type, ...]) -> tuple[type, ...]:
    return tuple(Tensor if kind is torch.nn.Parameter else kind for kind in types)


class IntegerClasses(dict[int, str]):
    """Triton's class of each integer: its width and, if specialised, whether 1 or divisible."""

    def __init__(self, flags: int) -> None:
        self.flags = flags

    def __missing__(self, value: int) -> str:
        found = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        if self.flags & SPECIALIZE and value == 1:
            found = "1"
        elif self.flags & SPECIALIZE and self.flags & ALIGN and value % 16 == 0:
            found += " divisible"
        if len(self) < MAX_ENTRIES:
            self[value] = found
        return found


CLASSES = [IntegerClasses(flags) for flags in range(4)]


def key_function(types: tuple[type, ...], flags: bytes) -> Callable[..., Any]:
    """``key(config, device, *arguments)`` for arguments of these types.

    The key is None if only the slow call serves: for other types, another device than that of the
    first tensor, and integers beyond 64 bits.
    """
    parts, first, names = ["config", "device"], None, [f"a{i}" for i in range(len(types))]
    served = True
    for name, kind, flag in zip(names, types, flags, strict=True):
        if flag & CONSTANT:
            served &= kind in (int, float, str, bool, type(None))
            parts.append(name)
        elif issubclass(kind, Tensor):
            served &= kind is Tensor
            first = first or name
            parts.append(f"{name}.dtype")
            if flag & SPECIALIZE:
                parts.append(f"{name}.data_ptr() & 15 == 0")
        elif kind is int:
            parts.append(f"classes_{flag & (SPECIALIZE | ALIGN)}[{name}]")
        else:
            served &= kind in (float, bool, type(None))
    if not served or first is None:
        return lambda config, device, *arguments: None
    source = (
        f"lambda config, device, {', '.join(names)}: "
        f"({', '.join(parts)}) if {first}.get_device() == device else None"
    )
    key: Callable[..., Any] = eval(source, {f"classes_{i}": CLASSES[i] for i in range(4)})
    return key
