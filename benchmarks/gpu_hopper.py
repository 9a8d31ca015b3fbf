"""The Hopper GEMMs on a GPU: every config against float64 and against itself, then their times."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.benchmarks.gpu_checks import captured, equal
from vlm_fast.devtools import tuning
from vlm_fast.devtools.passes import step, with_upstream
from vlm_fast.kernels import _hopper
from vlm_fast.kernels._hopper import Gemm
from vlm_fast.kernels.mlp import mlp_activation_backward
from vlm_fast.ops.declaration import OPS, Op
from vlm_fast.verification import self_test
from vlm_fast.verification.tolerance import judge

Row = dict[str, Any]
Failures = list[str]
OPS_WITH_GEMMS = ("mlp", "mlp_merge")
# Rows, and the widths of a projector: in, hidden, out. Odd ones, then those of models.
SHAPES = (
    (1, 8, 8, 16),
    (129, 72, 200, 264),
    (577, 1024, 4096, 4096),
    (576, 1024, 4096, 4096),
    (9216, 1024, 4096, 4096),
    (2056, 1408, 4096, 4096),
    (23328, 1152, 3584, 3584),
)
CHECKED_ROWS = 256  # of the largest results, against float64


def why_left_out(device: str) -> str | None:
    """None, or why nothing of this can run."""
    cause = _hopper.why_absent()
    if cause is None and not _hopper.runs_here(torch.empty(0, device=device)):
        cause = "this is no Hopper GPU"
    return cause


# ---- parity and repeats ----


def prove(
    device: str, deadline: float, shapes: Sequence[tuple[int, int, int, int]] | None = None
) -> Failures:
    """Every config of every GEMM at every shape: right by `parity.judge`, and the same bits."""
    failures = _as_ops(device, deadline)
    for shape in shapes or SHAPES:
        problem = Problem(shape, device)
        for gemm, check in CHECKS.items():
            for config in range(1, len(gemm.configs)):
                if time.monotonic() > deadline:
                    return [*failures, f"mlp {gemm.name}: out of time at {shape}"]
                label = f"mlp {gemm.name}, config {config}, {' x '.join(map(str, shape))}"
                failures += [f"{label}: {line}" for line in check(problem, config)]
    return failures


def _as_ops(device: str, deadline: float) -> Failures:
    """The ops themselves with each config: parity, and in a CUDA graph the bits of a usual call."""
    failures: Failures = []
    for config in range(1, max(len(gemm.configs) for gemm in _hopper.GEMMS.values())):
        with _forced(config):
            for name in OPS_WITH_GEMMS:
                op = OPS[name]
                for label, shape in self_test.shapes(op, full=device != "cpu"):
                    if time.monotonic() > deadline:
                        return [*failures, f"{name} : out of time at config {config}"]
                    case = self_test.check(op, label, shape, torch.bfloat16, device)
                    failures += [f"{line}, with config {config}" for line in case.failures()]
                if device != "cpu":
                    failures += [f"{name} {line}, with config {config}" for line in _graph(op)]
    return failures


@contextlib.contextmanager
def _forced(config: int) -> Iterator[None]:
    def choose(gemm: Gemm, like: Tensor, rows: int, widths: tuple[int, ...]) -> int:
        return config if gemm.serves(like, rows, widths) else 0

    with mock.patch.object(Gemm, "choose", choose):
        yield


def _graph(op: Op[..., Any]) -> Failures:
    """Capture fails on whatever waits for the device."""
    shape = self_test.one_sample(next(iter(op.bench_shapes.values())))
    args, options = op.sample(shape, torch.bfloat16, "cuda")
    inputs = with_upstream(op, args, options)
    expected = step(op.fast, inputs, options)
    try:
        graph, found = captured(lambda: step(op.fast, inputs, options))
    except RuntimeError as error:
        return [f"not captured: {error}"]
    for tensor in found:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return [] if equal(found, expected) else ["the replay of a CUDA graph differs"]


class Problem:
    """One projector with its input and upstream gradient, and what is right of it."""

    def __init__(self, shape: tuple[int, int, int, int], device: str) -> None:
        rows, inner, hidden, out = shape
        torch.manual_seed(0)
        random = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
        # A pitch wider than the row, as where a class token's place is skipped.
        self.x, self.dy = random(rows, inner + 8)[:, :inner], random(rows, out)
        self.weight_1, self.bias_1 = random(hidden, inner) * inner**-0.5, random(hidden) * 0.1
        self.weight_2, self.bias_2 = random(out, hidden) * hidden**-0.5, random(out) * 0.1
        self.z = F.linear(self.x, self.weight_1, self.bias_1)
        self.h = F.gelu(self.z)
        some = torch.randperm(rows, device=device)[:CHECKED_ROWS]
        ends = torch.arange(rows, device=device)
        self.some = torch.cat([some, ends[:64], ends[-64:]]).unique()
        self.slots = torch.randperm(rows + rows // 2 + 1, device=device)[:rows].int()
        self.slots[:: max(rows // 7, 2)] = -1


def _linear_gelu(p: Problem, config: int) -> Failures:
    def run(keep_z: bool) -> list[Tensor]:
        z, h = _hopper.linear_gelu(config, p.x, p.weight_1, p.bias_1, keep_z=keep_z)
        return [h] if z is None else [h, z]

    exact_z = F.linear(p.x[p.some].double(), p.weight_1.double(), p.bias_1.double())
    (h, z), failures = _repeated(lambda: run(True))
    if not torch.equal(run(False)[0], h):
        failures.append("h is another where z is not kept")
    return [
        *failures,
        *_judged("z", z[p.some], p.z[p.some], exact_z),
        *_judged("h", h[p.some], p.h[p.some], F.gelu(exact_z)),
    ]


def _gelu_backward(p: Problem, config: int) -> Failures:
    (dz, h, dbias), failures = _repeated(
        lambda: _hopper.gelu_backward(config, p.z, p.dy, p.weight_2, want_h=True, want_dbias=True)
    )
    alone, *_ = _hopper.gelu_backward(config, p.z, p.dy, p.weight_2, want_h=False, want_dbias=False)
    if not torch.equal(alone, dz):
        failures.append("dz is another where it is all that is wanted")
    rows = p.dy.shape[0]
    native_dz, _, native_dbias = mlp_activation_backward(
        p.z, torch.mm(p.dy, p.weight_2), rows, rows, "gelu", want_h=False, want_dbias=True
    )
    exact_dbias = torch.zeros(p.z.shape[1], dtype=torch.float64, device=p.z.device)
    for z, dy in zip(p.z.split(4096), p.dy.split(4096), strict=True):
        exact_dbias += _exact_dz(z, dy, p.weight_2).sum(0)
    exact_dz = _exact_dz(p.z[p.some], p.dy[p.some], p.weight_2)
    return [
        *failures,
        *_judged("dz", dz[p.some], native_dz[p.some], exact_dz, gradient=True),
        *_judged("h", h[p.some], p.h[p.some], F.gelu(p.z[p.some].double())),
        *_judged("dbias", dbias, native_dbias, exact_dbias, gradient=True),
    ]


def _exact_dz(z: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    dh = torch.mm(dy.double(), weight.double())
    return torch.ops.aten.gelu_backward(dh, z.double())


def _linear_scatter(p: Problem, config: int) -> Failures:
    rows, cols = p.dy.shape[0] + p.dy.shape[0] // 2 + 1, p.weight_2.shape[0]
    before = torch.full((rows, cols), 7.0, dtype=p.h.dtype, device=p.h.device)

    def run() -> list[Tensor]:
        out = before.clone()
        _hopper.linear_scatter(config, p.h, p.weight_2, p.bias_2, p.slots, out)
        return [out]

    (out,), failures = _repeated(run)
    kept = p.slots >= 0
    untouched = torch.ones(rows, dtype=torch.bool, device=out.device)
    untouched[p.slots[kept].long()] = False
    if not torch.equal(out[untouched], before[untouched]):
        failures.append("rows were written that no slot names")
    some = p.some[kept[p.some]]
    found = out[p.slots[some].long()]
    native = F.linear(p.h, p.weight_2, p.bias_2)[some]
    exact = F.linear(p.h[some].double(), p.weight_2.double(), p.bias_2.double())
    return [*failures, *_judged("out", found, native, exact)]


CHECKS: dict[Gemm, Callable[[Problem, int], Failures]] = {
    _hopper.LINEAR_GELU: _linear_gelu,
    _hopper.GELU_BACKWARD: _gelu_backward,
    _hopper.LINEAR_SCATTER: _linear_scatter,
}


def _repeated(run: Callable[[], Sequence[Any]]) -> tuple[Sequence[Any], Failures]:
    first = run()
    same = all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(), strict=True))
    return first, [] if same else ["results differ from call to call"]


def _judged(
    what: str, ours: Tensor, native: Tensor, exact: Tensor, *, gradient: bool = False
) -> Failures:
    verdict = judge(what, ours, native, exact, gradient=gradient)
    return [] if verdict.failure is None else [f"{what}: {verdict.failure}"]


# ---- times ----


@dataclass(frozen=True)
class Call:
    """A GEMM as it was asked for; config 0 is cuBLAS and its pass."""

    gemm: Gemm
    dtype: torch.dtype
    rows: int
    run: Callable[[int], object]


@contextlib.contextmanager
def calls() -> Iterator[list[Call]]:
    """Collect what the library could have served, and let it go where the tables send it."""
    found: list[Call] = []
    choose_and_run = Gemm.__call__

    def collect(gemm: Gemm, like: Tensor, rows: int, widths: Any, plain: Any, fused: Any) -> Any:
        if gemm.serves(like, rows, widths):
            # As within an op: no graph is recorded of what it calls.
            run = torch.no_grad()(lambda config: fused(config) if config else plain())
            found.append(Call(gemm, like.dtype, rows, run))
        return choose_and_run(gemm, like, rows, widths, plain, fused)

    with mock.patch.object(Gemm, "__call__", collect):
        yield found


def measure(device: str, deadline: float) -> list[Row]:
    """A row per GEMM, size and config at the named shapes, as `tuning.measure` has them."""
    rows: list[Row] = []
    seen: set[tuple[str, int]] = set()
    for name in OPS_WITH_GEMMS:
        for shape in OPS[name].bench_shapes.values():
            if time.monotonic() > deadline:
                return rows
            torch.manual_seed(0)
            args, options = OPS[name].sample(shape, torch.bfloat16, device)
            with calls() as found:
                step(OPS[name].fast, with_upstream(OPS[name], args, options), options)
            for call in found:
                if (call.gemm.name, call.rows) not in seen:
                    seen.add((call.gemm.name, call.rows))
                    rows += _time(call, device)
            del args, found
    return rows


def _time(call: Call, device: str) -> list[Row]:
    configs = dict(enumerate(call.gemm.configs))
    alternatives = {config: functools.partial(call.run, config) for config in configs}
    options = {config: found.options() for config, found in configs.items()}
    return tuning.rows_of(call.gemm.name, call.dtype, call.rows, alternatives, options, device)
