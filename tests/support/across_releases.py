"""Compares a patched family with its unpatched model in every way that users run it.

`examine_family(name)` returns what is patched in the installed transformers release, and raises
`Wrong` with all differences from unpatched. ``python -m tests.support.across_releases
[cases]`` does so for all cases, prints what is wrong, and writes one JSON object with ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import vlm_fast
from tests.support.families import CASES, build
from tests.support.ways_to_run import (
    WAYS,
    Inputs,
    Results,
    converted,
    forward,
    full_step,
    hookable,
    in_bfloat16,
    labels,
    step,
    with_hooks,
)
from vlm_fast.verification import tolerance

AFTER = ("verify", "a copy, unpatched", "reverted", "patched after its first call")
ALL = frozenset([*WAYS, "hooks", *AFTER])
# What the suite runs of each family, and of one that is served as an earlier one is.
QUICK = ALL - {"sampling", "reentrant checkpointing", "bfloat16", "disabled generation"}
FEW = frozenset(
    ["training step", "greedy generation", "generation from another layer", "hooks", "verify",
     "reverted"]
)  # fmt: skip


class Wrong(AssertionError):
    """A patched model raised where the unpatched one did not, or its results differ."""


# ---- comparing ----


def why_different(
    ours: Results, theirs: Results, way: Any, model: Any, inputs: Inputs
) -> str | None:
    """The difference, or None. Small differences are judged by the tolerance rule."""
    if ours.keys() != theirs.keys():
        return f"only on one side: {', '.join(sorted(ours.keys() ^ theirs.keys())[:4])}"
    off: dict[str, Tensor] = {}
    for name, expected in theirs.items():
        actual = ours[name]
        if type(actual) is not type(expected):
            return f"{name} is a {type(actual).__name__}, not a {type(expected).__name__}"
        kinds = [f"{t.dtype} {tuple(t.shape)}" for t in (actual, expected)]
        if kinds[0] != kinds[1]:
            return f"{name} is {kinds[0]}, not {kinds[1]}"
        if not expected.is_floating_point():
            if not torch.equal(actual, expected):
                return f"{name} is not equal"
        elif not is_near(actual, expected):
            off[name] = actual
    return why_wrong(off, way, model, inputs) if off else None


def is_near(actual: Tensor, expected: Tensor) -> bool:
    if expected.dtype != torch.float32:
        return torch.equal(actual, expected)
    finite = expected[expected.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    atol = max(2e-6, 2e-5 * largest)
    return torch.allclose(actual, expected, rtol=1e-4, atol=atol, equal_nan=True)


def why_wrong(off: dict[str, Tensor], way: Any, model: Any, inputs: Inputs) -> str | None:
    """Judge results that are not close, against float64 and other orders of summation."""
    wide, dtype, exact_way = copy.deepcopy(model), torch.float64, way
    if way is in_bfloat16:  # float32 is exact enough, and experts know no more
        wide, dtype, exact_way = wide.bfloat16(), torch.float32, step
    with contextlib.suppress(Exception):
        wide.set_attn_implementation("sdpa")  # eager's softmax would be in float32
    try:
        exact = exact_way(wide.to(dtype), converted(inputs, dtype))
    except Exception as error:
        return f"{next(iter(off))} differs, and in float64 there is {type(error).__name__}: {error}"
    if not off.keys() <= exact.keys():
        return f"{next(iter(off))} differs"
    outputs = [name for name in off if name.startswith(("output", "generated"))]
    verdicts = tolerance.judge_all(off, lambda: way(model, inputs), exact, outputs=outputs)
    failed = [f"{v.what}: {v.failure}" for v in verdicts if not v.ok]
    return "; ".join(failed[:3]) or None


# ---- a whole case ----


def examine_family(name: str, ways: Collection[str] = ALL) -> dict[str, Any]:
    """What is patched in a case, in the format of `tests/tools/served.json`.

    Raises:
        Wrong: the patched model differs from the unpatched one.
    """
    if not CASES[name].exists:
        return {"outcome": "-"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plain, inputs = build(name)
            base = CASES[name].prepare(copy.deepcopy(plain))  # the same without a patch
            forward(plain, inputs)
            full_step(plain, inputs)
        except Exception as error:
            return {"outcome": "n/a", "why": error_line(error)}
        return _examine_family(name, plain, base, inputs, ways)


def _examine_family(
    name: str, plain: Any, base: Any, inputs: Inputs, ways: Collection[str]
) -> dict[str, Any]:
    fast = copy.deepcopy(base)
    report = vlm_fast.patch(fast)
    kinds = sorted({what.split(" by ")[1] for what in report.patched.values()})
    reasons = sorted(set(report.skipped.values()))
    if not kinds and not reasons:
        raise Wrong(f"{name}: nothing is patched, and no reason is given")
    wrong, left_out, falls_back, ops = [], [], [], {}

    def compare(what: str, way: Any, reference: Any, ours: Any = None) -> None:
        try:
            theirs = way(reference, inputs)
        except NotImplementedError:  # of the way itself: there is nothing to run
            return
        except Exception:
            left_out.append(what)
            return
        theirs = {k: v.detach().clone() for k, v in theirs.items()}
        if what == "training step":
            vlm_fast.stats(reset=True)
        try:
            found = way(fast if ours is None else ours, inputs)
            reason = why_different(found, theirs, way, reference, inputs)
        except Exception as error:
            reason = f"raises {error_line(error)}"
        if what == "training step":
            for op, counts in vlm_fast.stats().items():
                falls_back.extend(f"{op}: {why}" for why in counts["fallback"])
                ops.update({op: counts["fast"]} if counts["fast"] else {})
        if reason is not None:
            wrong.append(f"{what}: {reason}")

    ways_here = WAYS | {"hooks": with_hooks(hookable(fast))}
    for what, way in ways_here.items():
        if what in ways and (kinds or what == "training step"):
            # If the model falls back, it equals the prepared unpatched model.
            compare(what, way, base if what == "hooks" else plain)
    if kinds and "verify" in ways:
        before, after = (full_step(m, inputs) for m in (plain, base))
        if why_different(after, before, full_step, plain, inputs) is None:  # or it is wrong itself
            verify(fast, base, inputs, wrong)
    for what, reverted in reverted_models(fast, report) if kinds else ():
        if what in ways:
            compare(what, full_step, base, reverted)
            if [type(m) for m in reverted.modules()] != [type(m) for m in base.modules()]:
                wrong.append(f"{what}: classes are not those of before")
    if kinds and AFTER[-1] in ways:
        again = vlm_fast.patch(base)  # which has been called before
        if again.patched != report.patched or again.skipped != report.skipped:
            wrong.append(f"{AFTER[-1]}: {again}; and before it: {report}")
        compare(AFTER[-1], full_step, plain, base)
    if wrong:
        raise Wrong(
            f"{name}, served by {', '.join(kinds)}:\n  " + "\n  ".join(group_by_reason(wrong))
        )
    found: dict[str, Any] = {"outcome": "equal" if kinds else "skipped", "served": kinds}
    if ops:
        found["ops"] = dict(sorted(ops.items()))
    for key, values in (("skipped", reasons), ("falls back", falls_back), ("not run", left_out)):
        if values:
            found[key] = sorted(values)
    return found


def verify(fast: Any, base: Any, inputs: Inputs, wrong: list[str]) -> None:
    """Check that `verify` judges every patched module that the inputs reach, and passes it.

    Calls of the merge op show whether the model reaches its merge.
    """
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in base.named_modules()
        if not isinstance(module, transformers.PreTrainedModel)
    ]
    forward(base, inputs)
    for hook in hooks:
        hook.remove()
    try:
        verification = vlm_fast.verify(fast, **inputs, **labels(fast, inputs))
    except Exception as error:
        wrong.append(f"verify: raises {error_line(error)}")
        return
    if not verification.connectors and called.isdisjoint(verification.unreached):
        return  # only what these inputs do not reach is patched
    if not verification.ok or called & set(verification.unreached):
        bad = [line for line in str(verification).splitlines() if not line.startswith("ok")]
        wrong.append(f"verify: {'; '.join(bad)}")


def reverted_models(fast: Any, report: Any) -> Iterator[tuple[str, Any]]:
    copied = copy.deepcopy(fast)
    vlm_fast.unpatch(copied)
    yield "a copy, unpatched", copied
    report.revert()
    yield "reverted", fast


def group_by_reason(wrong: list[str]) -> Iterator[str]:
    """Yield one line per reason, with all ways that have it."""
    reasons: dict[str, list[str]] = {}
    for line in wrong:
        way, _, reason = line.partition(": ")
        reasons.setdefault(reason, []).append(way)
    return (f"{', '.join(ways)}: {reason}" for reason, ways in reasons.items())


def error_line(error: BaseException) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.across_releases")
    parser.add_argument("--out", type=Path)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = {}
    for name in options.cases:
        try:
            found[name] = examine_family(name)
        except Wrong as error:
            found[name] = {"outcome": "wrong", "why": str(error)}
            print(error, file=sys.stderr, flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps({"release": transformers.__version__, "cases": found}))
    return int(any(case["outcome"] == "wrong" for case in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
