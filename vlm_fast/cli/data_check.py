"""The command ``vlm-fast data check``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlm_fast import terminal
from vlm_fast.cli.options import Exit, Json, print_json, stop
from vlm_fast.training.data.chat_formats import FORMATS
from vlm_fast.training.data.collator import Collator
from vlm_fast.training.data.datasets import CheckResult
from vlm_fast.training.data.datasets import check as checked
from vlm_fast.training.data.images import WHITE, Colour, parse_background
from vlm_fast.training.data.record_errors import BadRecord, OnBad, RecordIssue, count_by_kind

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]

SHOWN = 20  # issues of a kind that are printed as text
Background = Annotated[
    str, typer.Option(help="Colour behind transparent pixels: a name, or #rrggbb.")
]


def colour(name: str) -> Colour:
    """The colour that ``--background`` names."""
    try:
        return WHITE if name == "white" else parse_background(name)
    except ValueError as error:
        raise typer.BadParameter(f"--background: {error}") from None
    except ModuleNotFoundError as error:
        stop(Exit.ENVIRONMENT, f"{error}: pictures need Pillow (pip install pillow)")


def check(
    data: Annotated[Path, typer.Option(help="LLaVA's conversation JSON, or JSONL.")],
    images: Annotated[Path, typer.Option(help="The folder of images.")],
    on_bad: Annotated[
        OnBad, typer.Option(help="Stop at the first bad record, or skip it and name all.")
    ] = "skip",
    processor: Annotated[
        Path | None,
        typer.Option(help="A folder with a processor, to check that it accepts the records."),
    ] = None,
    format: Annotated[FormatName | None, typer.Option(help="With --processor.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a record; with --processor.")
    ] = None,
    background: Background = "white",
    as_json: Json = False,
) -> None:
    """Check every record and decode every image; exit 1 if a record is bad.

    With a processor, also check that it accepts the records, and that images and answers fit into
    --max-length. Duplicate ids and unknown keys are warnings: these records can be used.
    """
    if not data.is_file():
        raise typer.BadParameter(f"--data: there is no file {data}")
    if not images.is_dir():
        raise typer.BadParameter(f"--images: there is no folder {images}")
    if processor is None and (format, max_length) != (None, None):
        raise typer.BadParameter("--format and --max-length need --processor")
    below = colour(background)
    collate = None if processor is None else _collator(processor, format, max_length)
    try:
        with terminal.counter("checking") as count:
            found = checked(
                data, images, on_bad=on_bad, collate=collate, background=below, progress=count
            )
    except BadRecord as error:  # --on-bad stop
        assert error.issue is not None
        found = CheckResult(None, None, [error.issue])
    except OSError as error:
        raise typer.BadParameter(f"--data: {error}") from None
    except ModuleNotFoundError as error:
        stop(Exit.ENVIRONMENT, f"{error}: pictures need Pillow (pip install pillow)")
    bad = [issue for issue in found.issues if not issue.is_warning]
    if as_json:
        print_json({**as_dict(found), "ok": not bad})
    else:
        _print(data, found)
    if bad:
        raise typer.Exit(Exit.FAILURE)


def _collator(processor: Path, format: str | None, max_length: int | None) -> Collator:
    if not processor.is_dir():  # transformers would look for it on the hub
        raise typer.BadParameter(f"--processor: there is no folder {processor}")
    try:
        from transformers import AutoProcessor
    except ModuleNotFoundError:
        stop(Exit.ENVIRONMENT, "--processor needs transformers: pip install 'vlm_fast[hf]'")
    try:
        return Collator(
            AutoProcessor.from_pretrained(processor), format=format, max_length=max_length
        )
    except (OSError, TypeError, ValueError) as error:
        raise typer.BadParameter(f"--processor: {error}") from None


def as_dict(found: CheckResult) -> dict[str, Any]:
    """The result of a check as data for JSON."""
    return {
        "total": found.total,
        "good": found.good,
        "counts": count_by_kind(found.issues),
        "faults": [issue.as_dict() for issue in found.issues],
    }


def _print(data: Path, found: CheckResult) -> None:
    by_kind: dict[str, list[RecordIssue]] = {kind: [] for kind in count_by_kind(found.issues)}
    for issue in found.issues:
        by_kind[issue.kind].append(issue)
    for kind, issues in by_kind.items():
        for issue in issues[:SHOWN]:
            print(f"{'warning: ' if issue.is_warning else ''}{issue}")
        if len(issues) > SHOWN:
            print(f"and {len(issues) - SHOWN} more of {kind}; --json has all")
    rows: list[tuple[str, object]] = [(kind, len(issues)) for kind, issues in by_kind.items()]
    if found.total is None:
        rows.append(("stopped at the first bad record", ""))
    else:
        rows += [("good records", found.good), ("all records", found.total)]
    terminal.show(f"{data}", ("", "records"), rows)
