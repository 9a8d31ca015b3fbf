"""What is asked on the command line: names, numbers and sizes, checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated, TypeVar

import typer

from vlm_fast.advisor.connectors import CONNECTORS
from vlm_fast.advisor.model_shapes import MODELS
from vlm_fast.ops.mlp import SAVED

T = TypeVar("T")
V = TypeVar("V")
UNITS = {"": 1, "b": 1} | {
    f"{letter}{i}b": base**power
    for power, letter in enumerate("kmgt", 1)
    for i, base in (("", 1000), ("i", 1024))
}


def known(what: str, names: Iterable[str]) -> Callable[[str | None], str | None]:
    """A callback that lets a known name pass, or nothing."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"no {what} is called {value!r}; there are {', '.join(names)}")
        return value

    return check


def in_bytes(text: str | None) -> int | None:
    """A size such as 24GB (of 1000) or 24GiB (of 1024) in bytes."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in UNITS or float(found[1]) == 0:
        raise typer.BadParameter(f"{text!r} is no size; write it like 24GB or 24GiB")
    return int(float(found[1]) * UNITS[found[2]])


def listed(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def connectors_of(text: str | None) -> list[str] | None:
    """Names of connectors, by commas."""
    names = listed(text)
    if names is not None and not names:
        raise typer.BadParameter(f"none is named; there are {', '.join(CONNECTORS)}")
    for name in names or []:
        known("connector", CONNECTORS)(name)
    return names


def numbers(text: str | None) -> list[int] | None:
    """Positive whole numbers, by commas."""
    words = listed(text)
    if words is None:
        return None
    if not words or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise typer.BadParameter(f"{text!r}: expected whole numbers from 1, by commas: 576,64")
    return list(dict.fromkeys(map(int, words)))


def levels_of(text: str | None) -> list[str] | None:
    """Levels of ``saved``, by commas."""
    words = listed(text)
    if words is not None and not words:
        raise typer.BadParameter(f"none is named; there are {', '.join(SAVED)}")
    for word in words or []:
        known("level", SAVED)(word)
    return words


def checked(name: str, convert: Callable[[V], T], value: V) -> T:
    """``convert(value)``; a usage error of it names the option."""
    try:
        return convert(value)
    except typer.BadParameter as error:
        error.param_hint = name
        raise


ModelOption = Annotated[
    str, typer.Option(callback=known("model", MODELS), help=f"One of {', '.join(MODELS)}.")
]
ConnectorsOption = Annotated[
    str | None,
    typer.Option("--connectors", help=f"By commas, of {', '.join(CONNECTORS)}; all by default."),
]
