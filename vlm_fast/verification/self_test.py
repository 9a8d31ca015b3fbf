"""Check every op on this machine against its reference, on the GPU or else on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import vlm_fast.ops  # noqa: F401  fills OPS
from vlm_fast.ops.declaration import FLOATS, OPS, Op
from vlm_fast.verification import tolerance
from vlm_fast.verification.tolerance import Verdict

SHRUNK = 8


@dataclass(frozen=True)
class Case:
    """The result for one op at one shape in one dtype: verdicts, or the exception it raised."""

    op: str
    label: str
    dtype: str
    verdicts: Sequence[Verdict] = ()
    raised: str | None = None

    @property
    def ok(self) -> bool:
        return self.raised is None and bool(self.verdicts) and all(v.ok for v in self.verdicts)

    def failures(self) -> list[str]:
        """Return a line for each failure: op, shape, dtype, tensor, reason, error, budget."""
        where = f"{self.op} [{self.label}] {self.dtype}"
        if self.raised is not None:
            return [f"{where}: raised {self.raised}"]
        return [
            f"{where}: {v.what}: {v.failure} (error {v.error:.3g}, budget {v.budget:.3g})"
            for v in self.verdicts
            if not v.ok
        ]


def shapes(
    op: Op[..., Any], *, full: bool, thorough: bool = True
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the shapes that an op is checked at, each with a label.

    Args:
        op: the op.
        full: take the named shapes of real checkpoints at their real widths, one sample each. If
            False, take them with their sizes divided by `SHRUNK`.
        thorough: take all test shapes, then all named shapes. If False, take the first test shape
            (the smallest), the second (the usual one) and the last, and with ``full`` also the
            first named shape.
    """
    tests = list(op.test_shapes)
    named = list(op.bench_shapes.items())
    if not thorough:
        tests = [*tests[:2], *tests[2:][-1:]]
        named = named[:1] if full else []
    for shape in tests:
        yield ", ".join(f"{name}={value}" for name, value in shape.items()), shape
    for name, shape in named:
        if full:
            yield f"{name}, one sample", one_sample(shape)
        else:
            yield f"{name}, one sample, sizes / {SHRUNK}", shrink(one_sample(shape))


def one_sample(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shape with a batch of one; counts over the batch are divided by its size."""
    batch = shape.get("batch", 1)
    smaller = dict(shape)
    for name in ("batch", "count"):
        if name in shape:
            smaller[name] = shape[name] // batch
    if len(shape.get("shape", ())) == 3:
        smaller["shape"] = (1, *shape["shape"][1:])
    return smaller


def shrink(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shape with every size of 64 or more divided by `SHRUNK`.

    Counts of images and heads are below 64, so they stay.
    """

    def divided(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(divided(v) for v in value)
        return value // SHRUNK if type(value) is int and value >= 64 else value

    return {name: divided(value) for name, value in shape.items()}


def run(
    names: Iterable[str] | None = None,
    *,
    device: str | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    full: bool | None = None,
    thorough: bool = True,
) -> Iterator[Case]:
    """Judge every output and every gradient of every case; see `tolerance.judge` for the rule.

    Args:
        names: of ops; by default all ops.
        device: "cpu" or "cuda"; by default the GPU if there is one.
        dtypes: each shape is checked in each of them.
        full: see `shapes`; by default True on a GPU and False on a CPU, where it would take long.
        thorough: see `shapes`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    full = device != "cpu" if full is None else full
    for name in OPS if names is None else names:
        op = OPS[name]
        for label, shape in shapes(op, full=full, thorough=thorough):
            for dtype in dtypes:
                yield check(op, label, shape, dtype, device)


def count(names: Iterable[str], *, device: str, thorough: bool) -> int:
    """The number of cases that `run` yields with its default dtypes."""
    per_op = (shapes(OPS[n], full=device != "cpu", thorough=thorough) for n in names)
    return sum(len(FLOATS) for some in per_op for _ in some)


def check(
    op: Op[..., Any], label: str, shape: Mapping[str, Any], dtype: torch.dtype, device: str
) -> Case:
    """Check one op at one shape in one dtype, on inputs that depend on nothing but the shape."""
    word = str(dtype).removeprefix("torch.")
    torch.manual_seed(0)
    try:
        args, options = op.sample(shape, dtype, device)
        verdicts = tolerance.check(op, args, options, inference=True)
        return Case(op.name, label, word, verdicts)
    except Exception as error:  # a self-test reports every error and goes on
        return Case(op.name, label, word, raised=f"{type(error).__name__}: {error}")


def summarise(cases: Iterable[Case]) -> dict[str, dict[str, Any]]:
    """Summarise the cases of each op: number, dtypes, failures, largest error / budget."""
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        entry = found.setdefault(
            case.op, {"cases": 0, "dtypes": [], "failures": [], "worst_share_of_budget": 0.0}
        )
        entry["cases"] += 1
        if case.dtype not in entry["dtypes"]:
            entry["dtypes"].append(case.dtype)
        entry["failures"] += case.failures()
        shares = [v.error / v.budget for v in case.verdicts if v.ok and v.budget > 0]
        entry["worst_share_of_budget"] = max([entry["worst_share_of_budget"], *shares])
    return found
