"""The Hopper GEMMs on a GPU: compared with float64, and with themselves when repeated."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.benchmarks.gpu_checks import captured, equal
from vlm_fast.devtools.passes import step, with_upstream
from vlm_fast.kernels import _hopper
from vlm_fast.kernels.mlp import mlp_activation_backward
from vlm_fast.ops.declaration import OPS, Op
from vlm_fast.verification import self_test
from vlm_fast.verification.tolerance import judge

Failures = list[str]
MLP = OPS["mlp"]
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
    cause = _hopper.why_absent
    if cause is None and not _hopper.runs_here(torch.empty(0, device=device)):
        cause = "this is no Hopper GPU"
    return cause


# ---- parity and repeats ----


def prove(
    device: str, deadline: float, shapes: Sequence[tuple[int, int, int, int]] | None = None
) -> Failures:
    """Both GEMMs at every shape: right by `tolerance.judge`, and the same bits in every call."""
    failures = _as_an_op(device, deadline)
    for shape in shapes or SHAPES:
        problem = Problem(shape, device)
        for name, check in CHECKS.items():
            if time.monotonic() > deadline:
                return [*failures, f"mlp {name}: out of time at {shape}"]
            label = f"mlp {name}, {' x '.join(map(str, shape))}"
            failures += [f"{label}: {line}" for line in check(problem)]
    return failures


def _as_an_op(device: str, deadline: float) -> Failures:
    """`mlp` with the GEMMs at every size: parity, and in a CUDA graph the bits of a usual call."""
    failures: Failures = []
    with at_every_size():
        for label, shape in self_test.shapes(MLP, full=device != "cpu"):
            if time.monotonic() > deadline:
                return [*failures, "mlp with the Hopper GEMMs: out of time"]
            case = self_test.check(MLP, label, shape, torch.bfloat16, device)
            failures += [f"{line}, with the Hopper GEMMs" for line in case.failures()]
        if device != "cpu":
            failures += [f"mlp {line}, with the Hopper GEMMs" for line in _graph(MLP)]
    return failures


@contextlib.contextmanager
def at_every_size() -> Iterator[None]:
    """Let `mlp` take the GEMMs for any number of rows, not only where they are faster."""
    with mock.patch.multiple(_hopper, LINEAR_GELU_ROWS=1, GELU_BACKWARD_ROWS=1):
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
        self.weight_2 = random(out, hidden) * hidden**-0.5
        self.z = F.linear(self.x, self.weight_1, self.bias_1)
        self.h = F.gelu(self.z)
        some = torch.randperm(rows, device=device)[:CHECKED_ROWS]
        ends = torch.arange(rows, device=device)
        self.some = torch.cat([some, ends[:64], ends[-64:]]).unique()


def _linear_gelu(p: Problem) -> Failures:
    def run(keep_z: bool) -> list[Tensor]:
        z, h = _hopper.linear_gelu(p.x, p.weight_1, p.bias_1, keep_z=keep_z)
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


def _gelu_backward(p: Problem) -> Failures:
    (dz, h, dbias), failures = _repeated(
        lambda: _hopper.gelu_backward(p.z, p.dy, p.weight_2, want_h=True, want_dbias=True)
    )
    alone, *_ = _hopper.gelu_backward(p.z, p.dy, p.weight_2, want_h=False, want_dbias=False)
    if not torch.equal(alone, dz):
        failures.append("dz is another where it is all that is wanted")
    rows = p.dy.shape[0]
    native_dz, _, native_dbias, _ = mlp_activation_backward(
        p.z, torch.mm(p.dy, p.weight_2), p.dy, rows, rows, "gelu",
        want_h=False, want_dbias=True, want_dbias_2=False,
    )  # fmt: skip
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


CHECKS: dict[str, Callable[[Problem], Failures]] = {
    "linear_gelu": _linear_gelu,
    "gelu_backward": _gelu_backward,
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
