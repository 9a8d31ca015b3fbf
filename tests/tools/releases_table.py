"""Makes the tables of docs/releases.md from `tests/tools/served.json`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from tests.tools.releases import RELEASES, ROOT
from vlm_fast.benchmarks.report import between
from vlm_fast.benchmarks.support_matrix import served_words as words

PAGE = ROOT / "docs" / "releases.md"
Cell = dict[str, Any]
Cells = dict[str, dict[str, Cell]]

ABSENT = "-"


def write(cells: Cells) -> None:
    text = between(PAGE.read_text(), "releases", page(cells))
    PAGE.write_text(between(text, "families", summary(cells)))


def page(cells: Cells) -> str:
    """A row for each case, a column for each release; reasons are numbered below."""
    notes: list[str] = []

    def numbered(reasons: list[str]) -> str:
        for reason in reasons:
            if reason not in notes:
                notes.append(reason)
        numbers = ", ".join(str(notes.index(reason) + 1) for reason in reasons)
        return f" ({numbers})" if numbers else ""

    def shown(cell: Cell | None) -> str:
        if cell is None:
            return "?"
        if cell["outcome"] == ABSENT:
            return ABSENT
        if cell["outcome"] == "n/a":
            return "n/a" + numbered([cell["why"]])
        what = ", ".join(words(cell)) or "skipped"
        return what + numbered([*cell.get("falls back", []), *cell.get("skipped", [])])

    rows = [
        f"| {case} | " + " | ".join(shown(found.get(release)) for release in RELEASES) + " |"
        for case, found in cells.items()
    ]
    head = f"| | {' | '.join(RELEASES)} |\n|---|" + "---|" * len(RELEASES)
    listed = [f"{i}. {note}" for i, note in enumerate(notes, 1)]
    return "\n".join([head, *rows, "", *listed])


def summary(cells: Cells) -> str:
    """What is patched in each family and since which release; equal families share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for case, found in cells.items():
        if " " not in case:  # another form of the same
            rows.setdefault(tuple(spans(found)), []).append(case)
    table = [
        f"| {', '.join(names)} | {'; '.join(said) or 'nothing'} |" for said, names in rows.items()
    ]
    return "\n".join(["| family | served, in which releases |", "|---|---|", *table])


def spans(found: dict[str, Cell]) -> Iterator[str]:
    """``merge, projector from 5.12; projector 4.49 to 5.8``, the newest first."""
    present = [r for r in RELEASES if found.get(r, {}).get("outcome") in ("equal", "skipped")]
    groups = [(w, list(g)) for w, g in groupby(present, lambda release: words(found[release]))]
    for what, group in reversed(groups):
        if what:
            first, last = (release.rpartition(".")[0] for release in (group[0], group[-1]))
            until = f"from {first} on" if group[-1] == RELEASES[-1] else f"{first} to {last}"
            until = first if first == last and group[-1] != RELEASES[-1] else until
            yield f"{', '.join(what)} {until}"
