"""``vlm-fast advise`` and ``vlm-fast profile``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from vlm_fast import tables
from vlm_fast.design.advice import SCENARIOS, Option
from vlm_fast.design.advice import advise as advice_for
from vlm_fast.design.connectors import CONNECTORS
from vlm_fast.design.shapes import MODELS

UNITS = {"": 1, "b": 1} | {
    f"{letter}{i}b": base**power
    for power, letter in enumerate("kmgt", 1)
    for i, base in (("", 1000), ("i", 1024))
}


def known(what: str, names: Iterable[str]) -> Any:
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


ModelOption = Annotated[
    str, typer.Option(callback=known("model", MODELS), help=f"One of {', '.join(MODELS)}.")
]
ConnectorsOption = Annotated[
    str | None,
    typer.Option("--connectors", help=f"By commas, of {', '.join(CONNECTORS)}; all by default."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def advise(
    scenario: Annotated[
        str,
        typer.Option(callback=known("scenario", SCENARIOS), help=f"One of {', '.join(SCENARIOS)}."),
    ] = "documents",
    model: ModelOption = "llava-1.5-7b",
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the sequence; the model's own by default.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="For weights, keys and values: 24GB, 24GiB; no limit if not.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="In a prompt.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="At once.")] = None,
    text: Annotated[
        int, typer.Option(min=1, help="Tokens of text a request needs, with its answer.")
    ] = 256,
    connectors: ConnectorsOption = None,
    as_json: Json = False,
) -> None:
    """Which connector, how many visual tokens: ranked for a use, with figures and reasons."""
    found = advice_for(
        scenario, model, context=context, memory=_option("--memory", in_bytes, memory),
        images=images, requests=requests, text=text,
        connectors=_option("--connectors", connectors_of, connectors),
    )  # fmt: skip
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    limit = "no limit of memory" if found.memory is None else f"{found.memory / 1e9:.1f} GB"
    title = (
        f"{found.model}, {SCENARIOS[scenario].title}: {found.context} tokens of context, "
        f"{found.images} image(s) a prompt, {found.requests} request(s), {found.text} tokens of "
        f"text, {limit}, {found.dtype}"
    )
    tables.show(title, COLUMNS, [_cells(i, o) for i, o in enumerate(found.options, 1)])
    print(f"Order: {found.rule}.")
    print("FLOPs and bytes are those of the cost models, nothing was run; KV: keys and values.")
    for number, option in enumerate(found.options, 1):
        print(f"\n{number}. {option.title}, {_tokens(option)}")
        if option.infeasible:
            print(f"   cannot be had: {option.infeasible}")
        for mark, lines in (("+", option.reasons_for), ("-", option.reasons_against)):
            for line in lines:
                print(f"   {mark} {line}")
        for measurement in option.measured:
            print(f"   = {measurement}")


COLUMNS = (
    "", "connector", "visual tokens", "text left", "compression", "parameters", "KV a request",
    "memory", "requests fit", "connector forward", "backward keeps", "prefill", "measured",
)  # fmt: skip


def _cells(number: int, o: Option) -> tuple[object, ...]:
    measured = o.measured[0] if o.measured else None
    return (
        "-" if o.infeasible else number,
        o.title + (" *" if o.own else ""),
        _tokens(o),
        max(0, o.text_tokens_left),
        f"{o.compression:.3g}x",
        f"{o.parameters / 1e6:.1f} M",
        f"{o.key_value_bytes / 1e6:.0f} MB",
        f"{o.memory_bytes / 1e9:.1f} GB",
        "" if o.most_requests is None else o.most_requests,
        f"{o.cost.forward_flops / 1e9:.1f} GFLOP, {o.cost.forward_bytes / 1e6:.0f} MB",
        f"{min(o.saved_bytes.values()) / 1e6:.1f} MB",
        f"{o.prefill_flops / 1e12:.2f} TFLOP, {o.prefill_bytes / 1e9:.1f} GB",
        "" if measured is None else f"{measured.seconds * 1e3:.3g} ms ({measured.dtype})",
    )


def _tokens(option: Option) -> str:
    beside = "" if option.visual_tokens else f" ({option.seen_tokens} beside the sequence)"
    return f"{option.visual_tokens}{beside}"


def _option(name: str, convert: Any, value: Any) -> Any:
    try:
        return convert(value)
    except typer.BadParameter as error:
        error.param_hint = name
        raise
