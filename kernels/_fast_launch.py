"""Launches of kernels that Triton has compiled before, without Triton's binder.

A launcher is called as ``launcher(config, grid, *arguments)``. It makes a key of the arguments that
is equal for two calls exactly if Triton would run the same compiled kernel. A known key is launched
at once. For any other call it calls ``slow``, Triton's own launch, whose result it remembers.

There are two: `csrc/launch.c`, which is built when the package is installed or else by Triton's own
builder, and `PythonLauncher` where there is no C compiler.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from ._host import host
from ._python_launch import ALIGN, CONSTANT, SPECIALIZE, PythonLauncher
from ._triton import tl, triton

MAX_ARGUMENTS = 128
LAUNCHERS = ("c", "python", "triton")  # values of VLM_FAST_LAUNCHER
CUDA = 2  # DLPack's number
PARAMETER_TYPES = {"i1", "i8", "i16", "i32", "i64", "u1", "u8", "u16", "u32", "u64", "fp32"}

Launcher = Callable[..., Any]


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
    threads = 32 * metadata.num_warps
    return Recipe(compiled.function, threads, metadata.shared, bytes(sources), compiled)


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
    wanted = os.environ.get("VLM_FAST_LAUNCHER") or "c"
    if wanted not in LAUNCHERS:
        warnings.warn(
            f"VLM_FAST_LAUNCHER={wanted!r} is not one of {LAUNCHERS}; ignored", stacklevel=2
        )
        wanted = "c"
    knobs = triton.knobs
    if flags is None or wanted == "triton" or knobs.runtime.debug:
        return slow
    if getattr(knobs.compilation, "instrumentation_mode", ""):
        return slow
    idle = (recordings, *_settings(jit))
    if wanted == "c" and triton.runtime.driver.active.get_current_target().backend == "cuda":
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
    """What changes a launch: lists of hooks, and settings ``(dict, key, the usual value)``."""
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    hooks = {name: getattr(runtime, name) for name in ("launch_enter_hook", "launch_exit_hook")}
    return (
        jit.pre_run_hooks,
        *[hook.calls for hook in hooks.values() if hook is not None],
        *[(vars(runtime), name, hook) for name, hook in hooks.items()],
        (vars(runtime), "debug", False),
        (vars(runtime), "add_stages_inspection_hook", None),
        (vars(compilation), "instrumentation_mode", ""),
    )
