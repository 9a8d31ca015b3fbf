"""The table of CPU variants in docs/kernels.md matches the committed results."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "AMD_EPYC.json").read_text())
PAGE = (ROOT / "docs" / "kernels.md").read_text()
HEAD = "| op | variant | section | shape | pass | gain |\n"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.split(HEAD)[1].split("\n\n")[0].splitlines()[1:]
]


def measured(op, section, shape, mode):
    """The result rows of plain PyTorch and of vlm_fast."""
    if section == "ops":
        rows = [r for r in RESULTS["ops"] if (r["op"], r["shape"], r["mode"]) == (op, shape, mode)]
        by_provider = {r["provider"]: r for r in rows}
        return by_provider["eager"], by_provider["vlm_fast"]
    before, after = (r for r in RESULTS[section]["rows"] if r["part"] == f"{shape}, {mode}")
    return before, after


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_table_figures_match_committed_results(row):
    op, _, section, shape, mode, gain = row
    before, after = measured(op.split(",")[0], section, shape, mode)
    times, saved = before["median"] / after["median"], None
    if gain.endswith("x"):
        assert gain == f"{times:.1f}x" and times >= 1.3
    else:
        saved = after["saved_bytes"] / before["saved_bytes"]
        assert gain == f"{saved:.1f} of the saved bytes" and saved <= 0.7
