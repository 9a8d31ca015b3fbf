"""What the kernels of a pass execute and move, counted in compiled code; nothing is timed."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from vlm_fast.devtools import ahead_of_time, sass
from vlm_fast.devtools.ahead_of_time import Build, Resources
from vlm_fast.devtools.device_time.occupancy import occupancy
from vlm_fast.devtools.device_time.pass_kernels import AtenKernel, bytes_of
from vlm_fast.devtools.device_time.program_work import Program, Work
from vlm_fast.kernels._launcher import Launch


@dataclass(frozen=True)
class KernelCounts:
    """One launch of a kernel of this package.

    Attributes:
        name: of the kernel.
        programs, warps: of the launch, and of a program.
        blocks: programs that a multiprocessor holds at a time.
        bytes: read from memory and written to it; what all programs read alike counts once.
        instructions, shared, wide_flops, narrow_flops: of one program, as of
            `vlm_fast.devtools.device_time.work.Work`.
        steps: of one program: products, reductions, and loads that nothing hides. Loads in loops
            are hidden where the compiled code copies ahead (cp.async, TMA).
    """

    name: str
    programs: int
    warps: int
    blocks: int
    bytes: int
    instructions: int
    steps: int
    shared: int
    wide_flops: int
    narrow_flops: int


Counts = KernelCounts | AtenKernel


def count(kernels: Iterable[Launch | AtenKernel], arch: str) -> list[Counts]:
    """Counts of the kernels of a pass, compiled for an architecture such as "sm_90".

    Raises:
        RuntimeError: Triton is absent or interpreting.
        KeyError: the limits of ``arch`` are not known, see `occupancy.GPUS`.
    """
    return [k if isinstance(k, AtenKernel) else count_launch(k, arch, k.config) for k in kernels]


def count_launch(launch: Launch, arch: str, config: int = 0) -> KernelCounts:
    """Compile the kernel of a launch with config number ``config`` and count its work."""
    options = launch.kernel.configs[config]
    code, instructions, resources = _compiled(_Hashed(ahead_of_time.build_of(launch, arch, config)))
    program = Program(code, launch.arguments, options.num_warps, unknown_trips(launch, config))
    grid = launch.programs(config)
    programs = math.prod(grid)
    work = program.work(grid)
    # Machine code has more instructions than Triton's IR has operations: addresses, conversions.
    work.instructions *= instructions / program.static_instructions()
    hidden = work.looped_loads if resources.async_loads + resources.tma else 0.0
    fit = occupancy(arch, resources.registers, resources.shared_bytes, options.num_warps)
    return KernelCounts(
        launch.kernel.name, programs, options.num_warps, fit.blocks, _bytes(launch, work, programs),
        round(work.instructions), round(work.steps + work.loads - hidden), round(work.shared),
        round(work.wide_flops), round(work.narrow_flops),
    )  # fmt: skip


def unknown_trips(launch: Launch, config: int) -> tuple[float, ...]:
    """How often loops run on average whose bounds are loaded from memory, the outer loop first.

    They are loops of media attention; tokens are assumed to see media as in `cost` of the op.
    """
    given = launch.arguments
    if not launch.kernel.name.startswith("media_"):
        return (1.0,)
    media, queries, block_m = (given[name] for name in ("media", "queries", "BLOCK_M"))
    if "tokens_per_media" not in given:  # over the rows that see a medium; then those that see none
        return (math.ceil(math.ceil(queries / media / block_m) / given["splits"]), 0.0)
    if launch.kernel.name.startswith("media_key_gradient"):  # over the rows that see a medium
        steps = math.ceil(queries / media / block_m) * given["group"]
        return (math.ceil(steps / given.get("splits", 1)),)
    by_latest = 1 + (block_m - 1) * media / queries  # a tile may have tokens of two media
    seen = {"latest": min(by_latest, media), "all_previous": (media + 1) / 2, "listed": media}
    tiles = math.ceil(given["tokens_per_media"] / launch.kernel.configs[config].blocks["BLOCK_N"])
    tiles = math.ceil(tiles / given.get("splits", 1))
    return (
        (seen[given["ATTEND"]], tiles) if given.get("NESTED") else (seen[given["ATTEND"]] * tiles,)
    )


def _bytes(launch: Launch, work: Work, programs: int) -> int:
    """Bytes asked for through each pointer, but no more than the tensors behind it hold."""
    total = 0.0
    for (_, pointers), size in work.moved.items():
        tensors = [launch.arguments.get(name) for name in pointers]
        held = bytes_of([tensor for tensor in tensors if isinstance(tensor, Tensor)])
        total += min(size * programs, held) if held else size * programs
    return round(total)


class _Hashed:
    """A build, equal to another one of the same source, options and architecture."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.key = (build.source.hash(), build.arch, build.config)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self.key == other.key


@functools.cache
def _compiled(hashed: _Hashed) -> tuple[str, int, Resources]:
    """TTIR, number of machine instructions, and resources of a build."""
    (resources,) = ahead_of_time.count([hashed.build])
    asm = hashed.build.compile().asm
    instructions = len(sass.code(asm["cubin"])) // sass.INSTRUCTION_BYTES
    return asm["ttir"], instructions, resources
