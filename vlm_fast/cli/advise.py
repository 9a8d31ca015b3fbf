"""The command ``vlm-fast advise``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlm_fast import terminal
from vlm_fast.advisor.advice import SCENARIOS
from vlm_fast.advisor.advice import advise as advice_for
from vlm_fast.advisor.option import Option
from vlm_fast.cli.advisor_options import ConnectorsOption, ModelOption, in_bytes
from vlm_fast.cli.options import Json, print_json, values_of

if TYPE_CHECKING:
    ScenarioName = str
else:
    ScenarioName = Literal[tuple(SCENARIOS)]


def advise(
    scenario: Annotated[
        ScenarioName, typer.Option(help="The use for which options are ranked.")
    ] = "documents",
    model: ModelOption = "llava-1.5-7b",
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the sequence; the model's own by default.")
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=in_bytes,
            metavar="SIZE",
            help="Limit for weights, keys and values, such as 24GB or 24GiB; none by default.",
        ),
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="In a prompt.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="At once.")] = None,
    text: Annotated[
        int, typer.Option(min=1, help="Tokens of text a request needs, with its answer.")
    ] = 256,
    connectors: ConnectorsOption = None,
    as_json: Json = False,
) -> None:
    """Rank connectors and numbers of visual tokens for a use, with figures and reasons."""
    found = advice_for(
        scenario, model, context=context, memory=memory,
        images=images, requests=requests, text=text,
        connectors=values_of(connectors) or None,
    )  # fmt: skip
    if as_json:
        print_json(found.as_dict())
        return
    limit = "no limit of memory" if found.memory is None else f"{found.memory / 1e9:.1f} GB"
    title = (
        f"{found.model}, {SCENARIOS[scenario].title}: {found.context} tokens of context, "
        f"{found.images} image(s) a prompt, {found.requests} request(s), {found.text} tokens of "
        f"text, {limit}, {found.dtype}"
    )
    terminal.show(title, COLUMNS, [_cells(i, o) for i, o in enumerate(found.options, 1)])
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
        o.title + (" *" if o.published else ""),
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
