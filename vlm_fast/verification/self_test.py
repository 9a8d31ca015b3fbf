"""The parity of every op on this machine: the kernels on a GPU, the CPU path elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import vlm_fast.ops  # noqa: F401  declares what is checked
from vlm_fast.ops.declaration import FLOATS, OPS, Op
from vlm_fast.verification import tolerance
from vlm_fast.verification.tolerance import Verdict

SHRUNK = 8


@dataclass(frozen=True)
class Case:
    """One op at one shape in one dtype: its verdicts, or the exception that it raised."""

    op: str
    label: str
    dtype: str
    verdicts: Sequence[Verdict] = ()
    raised: str | None = None

    @property
    def ok(self) -> bool:
        return self.raised is None and bool(self.verdicts) and all(v.ok for v in self.verdicts)

    def failures(self) -> list[str]:
        """One line a failure: op, shape, dtype, tensor, what is wrong, error and budget."""
        where = f"{self.op} [{self.label}] {self.dtype}"
        if self.raised is not None:
            return [f"{where}: raised {self.raised}"]
        return [
            f"{where}: {v.what}: {v.failure} (error {v.error:.3g}, budget {v.budget:.3g})"
            for v in self.verdicts
            if not v.ok
        ]


def shapes(op: Op[..., Any], *, full: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The test shapes, then each named shape: one sample of it, with ``full``, or a small one."""
    for shape in op.test_shapes:
        yield ", ".join(f"{name}={value}" for name, value in shape.items()), shape
    for name, shape in op.bench_shapes.items():
        if full:
            yield f"{name}, one sample", one_sample(shape)
        else:
            yield f"{name}, one sample, sizes / {SHRUNK}", shrink(one_sample(shape))


def one_sample(shape: Mapping[str, Any]) -> dict[str, Any]:
    """A shape with a batch of one, and what is counted over the batch divided with it."""
    batch = shape.get("batch", 1)
    smaller = dict(shape)
    for name in ("batch", "count"):
        if name in shape:
            smaller[name] = shape[name] // batch
    if len(shape.get("shape", ())) == 3:
        smaller["shape"] = (1, *shape["shape"][1:])
    return smaller


def shrink(shape: Mapping[str, Any]) -> dict[str, Any]:
    """A shape with every size of 64 or more divided; counts of images and heads are below that."""

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
) -> Iterator[Case]:
    """Judge every output and gradient of every case; see `shapes` and `parity.judge`.

    Args:
        names: of ops; None is all of them.
        device: where; the GPU if there is one.
        full: named shapes at their real widths; by default on a GPU only, for time's sake.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    full = device != "cpu" if full is None else full
    for name in OPS if names is None else names:
        op = OPS[name]
        for label, shape in shapes(op, full=full):
            for dtype in dtypes:
                yield check(op, label, shape, dtype, device)


def check(
    op: Op[..., Any], label: str, shape: Mapping[str, Any], dtype: torch.dtype, device: str
) -> Case:
    """One case, with inputs that depend on nothing but the shape."""
    word = str(dtype).removeprefix("torch.")
    torch.manual_seed(0)
    try:
        args, options = op.sample(shape, dtype, device)
        verdicts = tolerance.check(op, args, options, inference=True)
        return Case(op.name, label, word, verdicts)
    except Exception as error:  # a self-test reports, whatever happened
        return Case(op.name, label, word, raised=f"{type(error).__name__}: {error}")


def summarise(cases: Iterable[Case]) -> dict[str, dict[str, Any]]:
    """Per op: how many cases and in which dtypes, the failures, the largest share of a budget."""
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
