"""The command ``vlm-fast data generate``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_fast import terminal
from vlm_fast.cli.options import Exit, Json, enum_of, print_json, stop, values_of
from vlm_fast.signals import handled
from vlm_fast.training.data.generation.coco import read_scenes
from vlm_fast.training.data.generation.endpoint import Endpoint, Unavailable
from vlm_fast.training.data.generation.prompts import KINDS
from vlm_fast.training.data.generation.rate_limit import RateLimit
from vlm_fast.training.data.generation.resume_log import ResumeLog
from vlm_fast.training.data.generation.run import (
    GenerationRun,
    Task,
    log_header,
    resume_log_path,
    tasks,
)
from vlm_fast.training.data.images import load_image
from vlm_fast.training.data.record_errors import BadRecord, RecordIssue, count_by_kind
from vlm_fast.training.data.records import Record

if TYPE_CHECKING:
    KindNames = list[str]
else:
    KindNames = list[enum_of(KINDS)]

SHOWN = 20  # annotations that are named one by one


def generate(
    captions: Annotated[Path, typer.Option(help="COCO's captions_*.json.")],
    boxes: Annotated[Path, typer.Option(help="COCO's instances_*.json.")],
    images: Annotated[Path, typer.Option(help="The folder of images.")],
    out: Annotated[
        Path, typer.Option(help="Conversation JSON; answers so far are kept beside it.")
    ],
    model: Annotated[str, typer.Option(help="Its name at the endpoint.")],
    base_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint; OpenAI's by default.")
    ] = None,
    key_variable: Annotated[
        str, typer.Option(help="The environment variable that holds the key.")
    ] = "OPENAI_API_KEY",
    kinds: Annotated[
        KindNames | None, typer.Option("--kind", help="May be repeated; all by default.")
    ] = None,
    rate: Annotated[float, typer.Option(min=0.001, help="Requests a minute.")] = 60.0,
    again: Annotated[
        int, typer.Option(min=0, help="How often a bad answer is requested again.")
    ] = 2,
    limit: Annotated[int | None, typer.Option(min=1, help="Only this many requests.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the prompts and their number; send nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Instruction data from captions and boxes: description, reasoning and conversation.

    Every answer is checked, and kept in FILE.resume.jsonl before the next request: run the same
    command again to resume. Exit codes: 1 if requests were not answered well or the endpoint gave
    up, 3 if the key is missing or not accepted, 130 if interrupted.
    """
    for option, path in (("--captions", captions), ("--boxes", boxes)):
        if not path.is_file():
            raise typer.BadParameter(f"{option}: there is no file {path}")
    if not images.is_dir():
        raise typer.BadParameter(f"--images: there is no folder {images}")
    for path in (out, resume_log_path(out)):
        if (why := terminal.why_not_writable(path)) is not None:
            raise typer.BadParameter(f"--out: {why}")
    if out.exists() and not resume_log_path(out).exists():
        raise typer.BadParameter(f"--out: {out} is there, and no resume log of it: choose another")
    left_out: list[RecordIssue] = []
    try:
        scenes = read_scenes(captions, boxes, issues=left_out)
        todo = tasks(scenes, values_of(kinds) or KINDS, limit)
        _look_at(todo, images)
    except BadRecord as bad:
        stop(Exit.FAILURE, str(bad))
    except OSError as error:
        raise typer.BadParameter(str(error)) from None
    _tell(left_out)
    if dry_run:
        _print_prompts(todo, limit, as_json, left_out)
        return
    try:
        endpoint = Endpoint(
            model, key_variable=key_variable, base_url=base_url, limit=RateLimit(rate)
        )
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        stop(Exit.ENVIRONMENT, "the openai client is missing: pip install 'vlm_fast[generate]'")
    except ValueError as error:
        stop(Exit.ENVIRONMENT, str(error))
    try:
        log = ResumeLog(resume_log_path(out), log_header(model))
    except ValueError as error:
        raise typer.BadParameter(f"--out: {error}") from None
    with log:
        run = GenerationRun(out, todo, endpoint, log, again=again)
        _ask(run, as_json, left_out)


def _tell(left_out: list[RecordIssue]) -> None:
    """Print the first annotations that were left out or are crowds, and their number by kind."""
    for issue in left_out[:SHOWN]:
        typer.echo(str(issue), err=True)
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in count_by_kind(left_out).items())
        typer.echo(f"annotations left out, or told as groups: {kinds}", err=True)


def _as_dict(left_out: list[RecordIssue]) -> dict[str, Any]:
    """The annotations that were left out, for JSON; empty if there are none."""
    if not left_out:
        return {}
    return {
        "annotations": count_by_kind(left_out),
        "faults": [issue.as_dict() for issue in left_out],
    }


def _ask(run: GenerationRun, as_json: bool, left_out: list[RecordIssue]) -> None:
    """Send the requests, and print a summary."""
    before, code, why = len(run.log.entries), None, ""
    try:
        with handled(), terminal.counter("asking") as count:
            run.generate(count)
    except KeyboardInterrupt:
        code, why = Exit.INTERRUPTED, "interrupted"
    except Unavailable as error:
        code, why = Exit.ENVIRONMENT if error.refused else Exit.FAILURE, str(error)
    failed = run.failed
    if code is None and failed:
        code = Exit.FAILURE
    summary: dict[str, Any] = {
        "questions": len(run.todo), "asked now": len(run.log.entries) - before,
        "good records": len(run.records), "not answered well": len(failed),
    }  # fmt: skip
    if as_json:
        summary |= {"failed": failed, "why": why or None, "out": str(run.out)}
        print_json({**summary, **_as_dict(left_out)})
    else:
        for task, reason in failed.items():
            print(f"{task}: {reason}")
        terminal.show(str(run.out), ("", ""), list(summary.items()))
    if why:
        stop(code or Exit.FAILURE, f"{why}; run the same command again to go on")
    if code is not None:
        raise typer.Exit(code)


def _look_at(todo: list[Task], images: Path) -> None:
    """Decode every image before any request is paid for."""
    scenes = {task.scene.id: task.scene for task in todo}.values()
    records = [Record(scene.id, scene.image, scene.image, ()) for scene in scenes]
    with terminal.counter("looking at pictures") as count, ThreadPoolExecutor() as pool:
        for done, _ in enumerate(pool.map(partial(load_image, images=images), records), 1):
            count(done, len(records))


def _print_prompts(
    todo: list[Task], limit: int | None, as_json: bool, left_out: list[RecordIssue]
) -> None:
    """Print all prompts if a limit was given, else the first one of each kind."""
    shown = todo if limit is not None else list({t.kind: t for t in reversed(todo)}.values())[::-1]
    if as_json:
        prompts = [{"task": task.name, "messages": task.messages} for task in shown]
        print_json({"questions": len(todo), "prompts": prompts, **_as_dict(left_out)})
        return
    for task in shown:
        print(f"--- {task.name}")
        for message in task.messages:
            print(f"[{message['role']}]\n{message['content']}\n")
    print(f"{len(todo)} questions; {len(shown)} of them shown")
