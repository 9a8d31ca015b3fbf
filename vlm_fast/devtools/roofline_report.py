"""Why an op could miss its target, as far as can be seen without a GPU.

Three kinds of statement, kept apart: what the compiler made of a kernel (counted in its code), what
a pass moves through memory against the least it could (counted on stand-ins, see `traffic`), and a
share of the floor that a model gives from both and from ceilings that are given. Nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm_fast.devtools import ahead_of_time, memory_traffic
from vlm_fast.devtools.ahead_of_time import Resources
from vlm_fast.devtools.memory_traffic import Piece
from vlm_fast.devtools.occupancy import GPUS, Occupancy, occupancy
from vlm_fast.ops.declaration import OPS, Cost, Op
from vlm_fast.verification import results_files

# Shares of the floor that the project wants, forward and backward; others want `MEMORY_BOUND`.
TARGETS = {
    "media_cross_attention": (0.70, 0.70),
    "merge_image_tokens": (0.92, 0.90),
    "anyres_pack": (0.90, 0.90),
    "anyres_pack_resized": (0.90, 0.90),
    "anyres_merge": (0.90, 0.90),
    "bipartite_match": (0.80, 0.80),
    "merge_tokens": (0.80, 0.88),
    "cross_attention": (0.85, 0.78),
    "pixel_shuffle_norm": (0.93, 0.88),
    "add_layer_norm": (0.94, 0.90),
    "gated_add": (0.93, 0.90),
    "gated_add_norm": (0.93, 0.90),
    "mlp": (0.92, 0.91),
}
MEMORY_BOUND = (0.88, 0.88)
MUCH = 0.1  # the share of a pass's bytes from which a kernel's loads and blocks matter to it


@dataclass(frozen=True)
class Given:
    """Ceilings taken as given, not measured here: bytes and FLOPs a second, seconds a launch."""

    copy: float = 4.3e12
    matmul: float = 790e12
    launch: float = 1.5e-6  # in a CUDA graph


@dataclass(frozen=True)
class Use:
    """One kernel in one pass of an op at one shape, with its first config."""

    op: str
    shape: str
    backward: bool
    resources: Resources
    occupancy: Occupancy
    grid: int
    bytes: int
    indexed: bool  # it reads numbers of rows, so its bytes are at most these


@dataclass(frozen=True)
class Pass:
    """One pass of an op at one shape: counts, the floor, and the model's share of it."""

    op: str
    shape: str
    backward: bool
    launches: int
    bytes: int
    least_bytes: int
    flops: int
    indexed: bool
    floor_seconds: float
    model_seconds: float
    target: float
    reasons: tuple[str, ...]

    @property
    def share(self) -> float | None:
        """None where nothing could be counted."""
        return self.floor_seconds / self.model_seconds if self.launches else None

    @property
    def misses(self) -> bool:
        return self.share is not None and self.share < self.target


@dataclass(frozen=True)
class Report:
    arch: str
    given: Given
    uses: list[Use]
    passes: list[Pass]
    never_run: list[str]


def report(
    names: Iterable[str] | None = None,
    *,
    arch: str = "sm_90",
    given: Given | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Every op at its bench shapes in bf16, its kernels compiled for ``arch``.

    Raises:
        RuntimeError: Triton is absent or interpreting.
        KeyError: the limits of ``arch`` are not known: see `occupancy.GPUS`.
    """
    _ = GPUS[arch]
    given, names = given or Given(), list(OPS if names is None else names)
    counted = [
        (OPS[name], label, memory_traffic.pieces(OPS[name], shape), _cost(OPS[name], shape))
        for name in names
        for label, shape in OPS[name].bench_shapes.items()
    ]
    launches = [piece.launch for _, _, pieces, _ in counted for piece in pieces if piece.launch]
    built = [ahead_of_time.build_of(launch, arch) for launch in launches]
    keys = [build.source.hash() for build in built]
    different = dict(zip(keys, built, strict=True))
    found = ahead_of_time.count(list(different.values()), progress)
    by_key = dict(zip(different, found, strict=True))
    resources = iter([by_key[key] for key in keys])
    uses, passes = [], []
    for op, label, pieces, cost in counted:
        own = [_use(op, label, piece, next(resources)) for piece in pieces if piece.launch]
        uses += own
        for backward in (False,) if op.returns_indices else (False, True):
            of_pass = [piece for piece in pieces if piece.backward == backward]
            used = [use for use in own if use.backward == backward]
            passes.append(_pass(op, label, backward, of_pass, used, cost, given))
    results = results_files.read_results()
    ran = {
        n for n in names if any(p.device == "cuda" for p in results_files.proofs(OPS[n], results))
    }
    return Report(arch, given, uses, passes, [name for name in names if name not in ran])


def _cost(op: Op[..., Any], shape: Any) -> Cost:
    with FakeTensorMode():
        values, settings = ahead_of_time.stand_ins(op, shape, torch.bfloat16)
        return op.cost_of(*values, **settings)


def _use(op: Op[..., Any], label: str, piece: Piece, resources: Resources) -> Use:
    launch = piece.launch
    assert launch is not None
    grid = 1
    for programs in launch.programs(0):
        grid *= programs
    fit = occupancy(
        resources.arch,
        resources.registers,
        resources.shared_bytes,
        launch.kernel.configs[0].num_warps,
        grid,
    )
    return Use(op.name, label, piece.backward, resources, fit, grid, piece.bytes, piece.indexed)


def _pass(
    op: Op[..., Any],
    label: str,
    backward: bool,
    pieces: Sequence[Piece],
    uses: Sequence[Use],
    cost: Cost,
    given: Given,
) -> Pass:
    least, flops = cost.forward_bytes, cost.forward_flops
    if backward:
        least, flops = cost.backward_bytes, cost.backward_flops
    moved = sum(piece.bytes for piece in pieces)
    floor = max(least / given.copy, flops / given.matmul)
    multiprocessors = GPUS[uses[0].resources.arch].count if uses else 1
    plain = [piece for piece in pieces if not piece.launch]
    ours = max(
        # Fewer blocks than multiprocessors leave some of them, and their share of memory, idle.
        sum(use.bytes / given.copy / min(use.grid / multiprocessors, 1.0) for use in uses),
        max(flops - sum(piece.flops for piece in plain), 0) / given.matmul if uses else 0.0,
    )
    aten = sum(max(p.bytes / given.copy, p.flops / given.matmul) for p in plain)
    model = ours + aten + given.launch * len(pieces)
    target = TARGETS.get(op.name, MEMORY_BOUND)[backward]
    reasons = list(_reasons(pieces, uses, moved, least, floor, given))
    indexed = any(use.indexed for use in uses)
    return Pass(
        op.name, label, backward, len(pieces), moved, least, flops, indexed, floor, model, target,
        tuple(dict.fromkeys(reasons)),
    )  # fmt: skip


def _reasons(
    pieces: Sequence[Piece],
    uses: Sequence[Use],
    moved: int,
    least: int,
    floor: float,
    given: Given,
) -> Iterator[str]:
    for use in uses:
        found, name = use.resources, use.resources.kernel
        if found.spills or found.stack_bytes:
            yield f"{name} spills"
        if found.dots and not found.tensor_core:
            yield f"{name}: products without tensor cores"
        if use.bytes < MUCH * moved:
            continue
        if found.loads and not (found.wide_loads or found.async_loads or found.tma):
            yield f"{name}: no load of 128 bits"
        if found.stores and not (found.wide_stores or found.tma):
            yield f"{name}: no store of 128 bits"
        if use.grid < GPUS[found.arch].count:
            yield f"{name}: {use.grid} blocks for {GPUS[found.arch].count} multiprocessors"
        elif use.occupancy.share < 0.25 and not found.dots:
            fit = use.occupancy
            yield f"{name}: {fit.share:.0%} of the warps resident ({fit.limit})"
    if moved > (1 + MUCH) * least and moved / given.copy > MUCH * floor:
        of_kernel: dict[str, int] = {}
        for piece in pieces:
            of_kernel[piece.name] = of_kernel.get(piece.name, 0) + piece.bytes
        most = sorted(of_kernel, key=lambda name: -of_kernel[name])[:3]
        parts = ", ".join(f"{name} {of_kernel[name] / 1e6:.1f} MB" for name in most)
        ratio = f"{moved / least:.2f}x the least bytes" if least else "bytes, and none needed"
        bound = "at most " if any(use.indexed for use in uses) else ""
        yield f"{bound}{ratio} ({parts})"
    if given.launch * len(pieces) > MUCH * floor:
        yield "1 launch" if len(pieces) == 1 else f"{len(pieces)} launches"


# ---- as text ----


def as_json(found: Report) -> dict[str, Any]:
    passes = [{**asdict(row), "share": row.share, "misses": row.misses} for row in found.passes]
    return {**asdict(found), "passes": passes}


def markdown(found: Report) -> str:
    """A page: what the model says of every pass, what the compiler made, what has never run."""
    given = found.given
    lines = [
        f"# What can be seen without a GPU ({found.arch}, bf16)",
        "",
        "Nothing here is measured. Registers, instructions and blocks are counted in compiled code,"
        " bytes on tensors without data: every tensor whole and once, so what follows an index"
        ' moves at most that ("<="). The share of the floor is a **model**: bytes at'
        f" {given.copy / 1e12:g} TB/s or FLOPs at {given.matmul / 1e12:g} TFLOP/s, both given, and"
        f" {given.launch * 1e6:g} us a launch, as in a CUDA graph.",
        "",
        "## Passes",
        "",
        "| op | shape | pass | launches | MB | least MB | floor, us | model, us | model's share |"
        " target | why |",
        "| --- " * 11 + "|",
    ]
    for row in found.passes:
        share = "not counted" if row.share is None else f"{row.share:.0%}"
        lines.append(
            _row(
                row.op, row.shape, "backward" if row.backward else "forward", row.launches,
                f"{'<= ' if row.indexed else ''}{row.bytes / 1e6:.1f}",
                f"{row.least_bytes / 1e6:.1f}",
                f"{row.floor_seconds * 1e6:.1f}", f"{row.model_seconds * 1e6:.1f}",
                f"**{share}**" if row.misses else share, f"{row.target:.0%}",
                "; ".join(row.reasons) if row.misses else "",
            )
        )  # fmt: skip
    lines += [
        "",
        "## Kernels",
        "",
        "With the first config. Wide: loads and stores of 128 bits, among all; asynchronous ones"
        " count as wide loads. Blocks: of the grid; a multiprocessor holds so many, limited by.",
        "",
        "| kernel | op, shape | registers | spills | shared | tensor core / dots | TMA |"
        " wide loads | wide stores | blocks | held | waves | tail | limited by |",
        "| --- " * 14 + "|",
    ]
    for use in found.uses:
        r, fit = use.resources, use.occupancy
        lines.append(
            _row(
                r.kernel, f"{use.op}, {use.shape}", r.registers, r.spills, r.shared_bytes,
                f"{r.tensor_core} / {r.dots}", r.tma, f"{r.wide_loads + r.async_loads} / {r.loads}",
                f"{r.wide_stores} / {r.stores}", use.grid, f"{fit.blocks} ({fit.share:.0%})",
                f"{fit.waves:.2f}", f"{fit.tail:.0%}", fit.limit,
            )
        )  # fmt: skip
    never = ", ".join(found.never_run) or "none"
    lines += ["", "## Never run on a GPU", "", f"No results file proves: {never}.", ""]
    return "\n".join(lines)


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"
