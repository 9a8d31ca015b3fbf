"""What the commands of ``vlm-fast`` share: exit codes, options, and how they print."""

from __future__ import annotations

import json
import sys
from enum import IntEnum
from typing import Annotated, Any, NoReturn

import typer

import vlm_fast.ops  # noqa: F401  declares what an option may name
from vlm_fast.ops.declaration import OPS


class Exit(IntEnum):
    FAILURE = 1
    USAGE = 2
    ENVIRONMENT = 3
    INTERRUPTED = 130  # as shells have it of SIGINT


def known_op(name: str | None) -> str | None:
    if name is not None and name not in OPS:
        raise typer.BadParameter(f"no op is called {name!r}; there are {', '.join(OPS)}")
    return name


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
OpArgument = Annotated[str | None, typer.Argument(callback=known_op, metavar="[OP]")]
OpOption = Annotated[str | None, typer.Option("--op", callback=known_op, help="Only this op.")]


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=1))


def stop(code: Exit, message: str) -> NoReturn:
    print(f"vlm-fast: {message}", file=sys.stderr)
    raise typer.Exit(code)
