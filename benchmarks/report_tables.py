"""Markdown tables of one results file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vlm_fast.benchmarks.charts import is_host_bound
from vlm_fast.benchmarks.models import proof
from vlm_fast.benchmarks.providers import EAGER, OURS
from vlm_fast.benchmarks.result_rows import (
    Row,
    best_peer,
    by_provider,
    megabytes,
    pairs,
    pieces,
    seconds,
)
from vlm_fast.benchmarks.support_matrix import short
from vlm_fast.ops.declaration import OPS

Result = Mapping[str, Any]
NO_RESULTS = "There is no results file yet."
MORE_BYTES = 1.02  # above this share of what it was, memory is a loss
FEW_BYTES = 100_000  # a smaller difference is not listed


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ---- what was measured, and how far ----


def conditions(result: Result) -> str:
    """On what machine, with which versions and at which commit the figures were measured."""
    versions, where = result["versions"], result["machine"]
    if result["device"] == "cpu":
        extension = "with" if result["compiled_extension"] else "without"
        where += f" (one thread, {extension} the compiled extension)"
    found = next(iter(result["models"].values()))
    return (
        f"Measured on {where}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{result['date']}, commit {short(result['commit'])}: random weights, {found['dtype']}, "
        f"{found['photograph']}. Times are medians of calls in turns; the results file has the "
        "quartiles."
    )


def unfinished(result: Result) -> str:
    """The stages and sections that failed or ran out of time, or an empty string."""
    stages = {name: stage["status"] for name, stage in result.get("stages", {}).items()}
    failed = [name for name, status in stages.items() if status == "FAILED"]
    late = [name for name, status in stages.items() if status == "out of time"]
    words = []
    if failed:
        words.append(f"These stages failed, or ran out of time on the way: {', '.join(failed)}.")
    if late:
        words.append(f"These were not reached: {', '.join(late)}.")
    words += [f"Not finished: {line}." for line in result.get("failures", [])]
    return " ".join(words)


# ---- the best and the worst ----


def best_and_worst(result: Result) -> str:
    """The best and the worst row of each model and family, then of ops by their device time.

    The model or family with the largest gain comes first.
    """
    kinds: dict[str, list[tuple[Row, Row]]] = {}
    for title, before, after in pieces(result):
        kinds.setdefault(title, []).append((before, after))
    cells = []
    for title in sorted(kinds, key=lambda title: -max(map(_gain, kinds[title]))):
        best, worst = max(kinds[title], key=_gain), min(kinds[title], key=_gain)
        cells.append((title, _piece(*best), _piece(*worst) if worst is not best else "the same"))
    for mode in ("forward", "backward"):
        ratios = sorted(_peer_ratios(result, mode))
        if ratios:
            clock = "GPU time" if result["device"] == "cuda" else "time"
            cells.append((f"ops, {mode}, {clock}", ratios[-1][1], ratios[0][1]))
    return markdown(("", "best case", "worst case"), cells)


def _gain(pair: tuple[Row, Row]) -> float:
    return float(pair[0]["median"] / pair[1]["median"])


def _piece(before: Row, after: Row) -> str:
    bound = ", host-bound" if is_host_bound(before, after) else ""
    peak = ""
    if before["peak_bytes"]:
        peak = f"; peak {megabytes(before['peak_bytes'])} → {megabytes(after['peak_bytes'])}"
    times = f"{seconds(before['median'])} → {seconds(after['median'])}"
    return f"**{_gain((before, after)):.2f}x** {after['part']}{bound}: {times}{peak}"


def _peer_ratios(result: Result, mode: str) -> Iterator[tuple[float, str]]:
    """Of every op and shape: the fastest other provider's time over ours, and both in words.

    Shapes with dropout are left out: plain PyTorch there computes the same mask as the kernel, with
    many operations, and not the mask that `torch.nn.functional.dropout` would draw.
    """
    for key, found in by_provider(result.get("ops", [])).items():
        op, shape = OPS.get(key[0]), key[1]
        if op is None or op.bench_shapes.get(shape, {}).get("dropout"):
            continue
        if key[4] == mode and OURS in found and len(found) > 1:
            peer, ours = found[best_peer(found)], found[OURS]
            ratio = peer["median"] / ours["median"]
            words = f"{seconds(peer['median'])} → {seconds(ours['median'])}"
            yield ratio, f"**{ratio:.2f}x** {op.name}, {shape}, over {peer['provider']}: {words}"


def against_best_peer(result: Result) -> str:
    """A line for each op, shape and pass: ours, and the fastest other provider."""
    cells = []
    for (op, shape, _, _, mode), found in by_provider(result["ops"]).items():
        if op in OPS and OURS in found and len(found) > 1:
            peer, ours = found[best_peer(found)], found[OURS]
            ratio = f"{peer['median'] / ours['median']:.2f}x, {peer['ours_is']}"
            theirs = f"{peer['provider']}, {seconds(peer['median'])}"
            cells.append((op, shape, mode, seconds(ours["median"]), theirs, ratio))
    return markdown(("op", "shape", "pass", "vlm_fast", "fastest other", "vlm_fast is"), cells)


def losses(result: Result) -> str:
    """Where ours is slower than eager PyTorch, or takes more memory."""
    cells: list[tuple[str, str, str]] = []
    for title, before, after in pieces(result):
        if after["ours_is"] == "slower":
            ratio = after["median"] / before["median"]
            bound = " (host-bound)" if is_host_bound(before, after) else ""
            cells.append((title, after["part"], f"{ratio:.2f} times the time{bound}"))
        for key, words in (("peak_bytes", "peak memory"), ("saved_bytes", "saved bytes")):
            if not before[key] or not after[key] or after[key] - before[key] <= FEW_BYTES:
                continue
            if after[key] > MORE_BYTES * before[key]:
                share = f"{after[key] / before[key]:.2f} of the {words}"
                cells.append((title, after["part"], share))
    for row in result.get("ops", []):
        if row["status"] != "measured" or row["provider"] != EAGER or row["op"] not in OPS:
            continue
        if row["ours_is"] == "slower":
            words = f"{1 / row['times_faster']:.2f} times the time of eager"
            cells.append((row["op"], f"{row['shape']}, {row['mode']}", words))
    return markdown(("", "", "takes"), cells) if cells else "No loss was measured."


# ---- everything ----


def waits_of(result: Result) -> str:
    if result["device"] == "cpu":
        return "host waits on CUDA (counted, not run)"
    return "host waits"


def models(result: Result) -> Iterator[str]:
    """For each model its proof in words, and its table."""
    for found in result["models"].values():
        yield (
            f"**{found['model']}**, {found['dtype']}, batch {found['batch']}, "
            f"{found['sequence']} tokens. Patched against unpatched: {proof.line(found['proof'])}."
        )
        yield before_and_after(found["rows"], waits_of(result))


def before_and_after(rows: Sequence[Row], waits: str) -> str:
    def change(before: Row, after: Row, key: str, show: Callable[[float], str]) -> str:
        if before[key] is None or after[key] is None:
            return ""
        return f"{show(before[key])} → {show(after[key])}"

    cells = [
        (
            after["part"],
            change(before, after, "median", seconds),
            f"{_gain((before, after)):.2f}x, {after['ours_is']}",
            change(before, after, "peak_bytes", megabytes),
            change(before, after, "saved_bytes", megabytes),
            change(before, after, "synchronisations", str),
        )
        for before, after in pairs(rows)
    ]
    return markdown(("", "time", "vlm_fast is", "peak memory", "saved for backward", waits), cells)


def every_provider(rows: Sequence[Row]) -> str:
    cells = []
    for (op, shape, _, _, mode), found in by_provider(rows).items():
        if op not in OPS or OURS not in found:
            continue
        ours = found[OURS]
        others = "; ".join(
            f"{name} {seconds(row['median'])} ({row['ours_is']})"
            for name, row in found.items()
            if name != OURS
        )
        floor = f"{ours['of_floor']:.0%}"
        cells.append((op, shape, mode, seconds(ours["median"]), floor, others))
    columns = ("op", "shape", "pass", "vlm_fast", "of the floor", "others (vlm_fast is)")
    return markdown(columns, cells)


def op_overhead(rows: Sequence[Row]) -> str:
    cells = [(row["op"], row["mode"], f"{row['extra_us']:.0f} µs") for row in rows]
    return markdown(("op", "", "extra"), cells)
