"""Exit codes, options and printing that the commands of ``vlm-fast`` share."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

import vlm_fast.ops  # noqa: F401  declares what an option may name
from vlm_fast.ops.declaration import OPS


def enum_of(names: Iterable[str]) -> Any:
    """An Enum of names: typer takes lists of Enums as options that repeat, but not of Literals."""
    return Enum("Name", {name: name for name in names})


def values_of(chosen: Iterable[Any] | None) -> list[str]:
    """The names that were chosen from an `enum_of`, each once; empty if none were."""
    return list(dict.fromkeys(member.value for member in chosen or ()))


if TYPE_CHECKING:
    OpName = str
    OpNames = list[str]
else:  # typer refuses other names, and lists these
    OpName = Literal[tuple(OPS)]
    OpNames = list[enum_of(OPS)]


class Exit(IntEnum):
    """Exit codes of the commands."""

    FAILURE = 1
    USAGE = 2
    ENVIRONMENT = 3
    INTERRUPTED = 130  # what shells use for SIGINT


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
OpArgument = Annotated[OpName | None, typer.Argument(metavar="[OP]")]
OpOption = Annotated[OpName | None, typer.Option("--op", metavar="OP", help="Only this op.")]
OpsOption = Annotated[
    OpNames | None,
    typer.Option("--op", metavar="OP", help="Only these ops; may be repeated."),
]


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=1))


def stop(code: Exit, message: str) -> NoReturn:
    """Print an error message and exit."""
    print(f"vlm-fast: {message}", file=sys.stderr)
    raise typer.Exit(code)
