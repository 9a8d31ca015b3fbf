"""Rows of a results file: grouped by provider, paired before and after, and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlm_fast.benchmarks.providers import EAGER, OURS, PEERS

Row = Mapping[str, Any]
Key = tuple[str, ...]
SAME_CALL = ("op", "shape", "scale", "dtype", "mode")
FAMILIES = {  # sections of pieces of models, and their titles
    "image_token_merge": "image-token merge",
    "qformer": "Q-Former",
    "gated_cross_attention": "gated cross-attention",
    "anyres_packing": "AnyRes packing",
    "token_merging": "token merging",
    "patch_mergers": "patch mergers",
}
# Peers that compute another function: they are listed in tables, and are never the best peer.
OTHER_FUNCTIONS = {peer.name for peer in PEERS if not peer.same}


def by_provider(rows: Sequence[Row]) -> dict[Key, dict[str, Row]]:
    """The measured rows of each op, shape, scale, dtype and pass, by the name of the provider."""
    found: dict[Key, dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "measured":
            key = tuple(str(row[name]) for name in SAME_CALL)
            found.setdefault(key, {})[row["provider"]] = row
    return found


def best_peer(found: Mapping[str, Row]) -> str:
    """The name of the fastest provider beside ours that computes the same function."""
    others = [name for name in found if name != OURS and name not in OTHER_FUNCTIONS]
    return min(others, key=lambda name: float(found[name]["median"]), default=EAGER)


def pairs(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """The rows "before" and "after" of each part that has both."""
    before: dict[str, Row] = {row["part"]: row for row in rows if row["state"] == "before"}
    for row in rows:
        if row["state"] == "after" and row["part"] in before:
            yield before[row["part"]], row


def pieces(result: Mapping[str, Any]) -> Iterator[tuple[str, Row, Row]]:
    """The title of a model or family, and its rows before and after; whole models come first."""
    for found in result.get("models", {}).values():
        for before, after in pairs(found["rows"]):
            # The words in parentheses say how the model was cut; tables have them.
            yield found["model"].partition(" (")[0], before, after
    for family, title in FAMILIES.items():
        for before, after in pairs(result.get(family, {}).get("rows", [])):
            yield title, before, after


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e9:.3g} GB"
