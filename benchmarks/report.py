"""Write the charts and tables of README and docs: ``python -m vlm_fast.benchmarks.report``.

Everything comes from the committed results files and `support_matrix.SERVED`; nothing is measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_fast.benchmarks import charts, report_tables, support_matrix
from vlm_fast.benchmarks.result_rows import FAMILIES
from vlm_fast.verification import results_files

Result = dict[str, Any]
ROOT = results_files.PACKAGE.parent
README, MEASURED = ROOT / "README.md", ROOT / "docs" / "measured.md"
CHARTS = ROOT / "docs" / "charts"


def main(readme: Path = README, measured: Path = MEASURED, folder: Path = CHARTS) -> None:
    """Write the charts into ``folder``, and the tables between markers of the two pages."""
    results = readable(results_files.read_results())
    if results:
        folder.mkdir(exist_ok=True)
        for name, chart in charts.CHARTS.items():
            if chart.bars(results[0]):
                charts.draw(chart, results[0], folder / f"{name}.svg")
    for path, name, content in contents(results, readme, measured):
        path.write_text(between(path.read_text(), name, content))


def readable(results: Sequence[Result]) -> list[Result]:
    """The results of long runs with models; those of GPUs come first."""
    long = [r for r in results if not r.get("quick") and r.get("models")]
    return sorted(long, key=lambda r: (r["device"] == "cpu", r["machine"]))


def contents(
    results: Sequence[Result], readme: Path = README, measured: Path = MEASURED
) -> Iterator[tuple[Path, str, str]]:
    """Each page that is written, the name of a pair of markers in it, and the text between them."""
    figures = "\n\n".join(shown_first(results[0])) if results else report_tables.NO_RESULTS
    yield readme, "figures", figures
    yield readme, "support", support_matrix.matrix(results)
    yield measured, "measured", "\n\n".join(everything(results)) or report_tables.NO_RESULTS


def between(text: str, name: str, content: str) -> str:
    """The text with everything between two markers replaced.

    Raises:
        ValueError: the markers do not stand in the text exactly once.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", re.DOTALL)
    replaced, count = pattern.subn(lambda m: f"{m[1]}\n{content}\n{m[2]}", text)
    if count != 1:
        raise ValueError(f"{begin} and {end} must stand in the text once, found {count} times")
    return replaced


def shown_first(result: Result) -> Iterator[str]:
    """For the README: the best and the worst row of each kind, side by side."""
    yield report_tables.best_and_worst(result)
    if result["device"] == "cuda":
        yield (
            "Host-bound: the wall time is less than "
            f"{charts.HOST_SECONDS_PER_LAUNCH * 1e6:.0f} µs for each kernel launch, without or "
            "with the patch, so the time is that of the host. CUDA graphs and torch.compile avoid "
            "it."
        )
    yield report_tables.conditions(result)
    unfinished = report_tables.unfinished(result)
    if unfinished:
        yield unfinished


def everything(results: Sequence[Result]) -> Iterator[str]:
    """For docs/measured.md: all that the results files hold."""
    if results and not any(result["device"] == "cuda" for result in results):
        yield "There is no results file of a GPU yet, so there are no GPU figures."
    for result in results:
        yield f"## {result['machine']}"
        yield report_tables.conditions(result)
        unfinished = report_tables.unfinished(result)
        if unfinished:
            yield unfinished
        yield "### Where it loses"
        yield report_tables.losses(result)
        if result.get("ops"):
            yield "### Ops against the fastest other provider"
            yield report_tables.against_best_peer(result)
        yield "### Whole models"
        yield from report_tables.models(result)
        for family, title in FAMILIES.items():
            if result.get(family, {}).get("rows"):
                yield f"### {title[0].upper()}{title[1:]}, {result[family]['dtype']}"
                waits = report_tables.waits_of(result)
                yield report_tables.before_and_after(result[family]["rows"], waits)
        if result.get("ops"):
            yield "### Ops against every provider"
            yield (
                "The column of vlm_fast's time is followed by its share of the floor, which is the "
                "time of a copy or a matrix product of the same size, measured in the same run."
            )
            yield report_tables.every_provider(result["ops"])
        if result.get("op_overhead"):
            yield "### Python overhead of a call over plain ATen, CPU time"
            yield report_tables.op_overhead(result["op_overhead"])


if __name__ == "__main__":
    main()
