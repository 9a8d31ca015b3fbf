"""Options that ``vlm-fast advise`` and ``vlm-fast profile`` share."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlm_fast.advisor.connectors import CONNECTORS
from vlm_fast.advisor.model_shapes import MODELS
from vlm_fast.cli.options import enum_of

if TYPE_CHECKING:
    ModelName = str
    ConnectorNames = list[str]
else:  # typer refuses other names, and lists these
    ModelName = Literal[tuple(MODELS)]
    ConnectorNames = list[enum_of(CONNECTORS)]

UNITS = {"": 1, "b": 1} | {
    f"{letter}{i}b": base**power
    for power, letter in enumerate("kmgt", 1)
    for i, base in (("", 1000), ("i", 1024))
}


def in_bytes(text: str) -> int:
    """Parse a size such as 24GB (powers of 1000) or 24GiB (powers of 1024)."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in UNITS or float(found[1]) == 0:
        raise typer.BadParameter(f"{text!r} is no size; write it like 24GB or 24GiB")
    return int(float(found[1]) * UNITS[found[2]])


ModelOption = Annotated[ModelName, typer.Option(help="Shape of a published model.")]
ConnectorsOption = Annotated[
    ConnectorNames | None,
    typer.Option("--connector", help="May be repeated; all by default."),
]
