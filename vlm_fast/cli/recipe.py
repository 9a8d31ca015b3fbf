"""The command ``vlm-fast recipe``."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer

from vlm_fast import terminal
from vlm_fast.cli.data_check import Background, colour
from vlm_fast.cli.options import Exit, Json, print_json, stop
from vlm_fast.cli.processes import (
    decided_by_main,
    destroy_process_group,
    is_main,
    log_to_stderr,
    process_count,
    usage_error,
)
from vlm_fast.cli.recipe_preflight import (
    check_arguments,
    check_data,
    check_model,
    starting_checkpoint,
)
from vlm_fast.ops.declaration import DTYPES
from vlm_fast.training.data import BadRecord
from vlm_fast.training.data.chat_formats import FORMATS
from vlm_fast.training.data.record_errors import OnBad
from vlm_fast.training.recipes import checkpoints
from vlm_fast.training.recipes.model_parts import LANGUAGE
from vlm_fast.training.recipes.presets import RECIPES
from vlm_fast.training.recipes.recipe import count_parameters
from vlm_fast.training.recipes.run import RecipeRun, model_class, train

if TYPE_CHECKING:
    RecipeName = str
    DtypeName = str
    FormatName = str
else:
    RecipeName = Literal[tuple(RECIPES)]
    DtypeName, FormatName = Literal[tuple(DTYPES)], Literal[tuple(FORMATS)]

logger = logging.getLogger(__name__)


def recipe(
    name: Annotated[RecipeName | None, typer.Argument(metavar="[NAME]")] = None,
    model: Annotated[
        Path | None, typer.Option(help="A folder with a transformers model and its processor.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="LLaVA's conversation JSON, or JSONL.")] = None,
    images: Annotated[Path | None, typer.Option(help="The folder of images.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for checkpoints and the trained model.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(min=0.0, help="Replaces the recipe's.")] = None,
    lr: Annotated[float | None, typer.Option(min=0.0, help="Replaces the recipe's.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Examples a step, on all processes together.")
    ] = None,
    device_batch: Annotated[
        int, typer.Option(min=1, help="Examples on a device at once; gradients accumulate.")
    ] = 4,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many steps.")
    ] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last complete checkpoint in --out.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the data order, new parameters and dropout.")] = 42,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="To compute in; by default the model's.")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations in backward.")
    ] = False,
    lora: Annotated[
        int | None, typer.Option(min=1, help="Adapters of this rank in the language model.")
    ] = None,
    on_bad: Annotated[OnBad, typer.Option(help="Stop at a bad record, or leave it out.")] = "stop",
    format: Annotated[
        FormatName | None, typer.Option(help="Of conversations; by default the recipe's.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of an example.")] = None,
    background: Background = "white",
    no_patch: Annotated[
        bool, typer.Option("--no-patch", help="Train transformers' own modules.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read data.")] = 2,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, and print the plan.")
    ] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
    as_json: Json = False,
) -> None:
    """Train a connector by one of the papers' recipes, on one process or under accelerate launch.

    Exit codes: 1 also if a record is bad; 130 if a signal ended the run, after a checkpoint.
    """
    if list_recipes or name is None:
        _list(as_json)
        return
    log_to_stderr()
    needed = {"--model": model, "--data": data, "--images": images, "--out": out}
    for option, value in needed.items():
        if value is None:
            usage_error("is missing", option)
    for package in ("transformers", "accelerate", *(["peft"] if lora else [])):
        if importlib.util.find_spec(package) is None:
            stop(Exit.ENVIRONMENT, f"recipe needs {package}: pip install {package}")
    run = RecipeRun(
        RECIPES[name], model, data, images, out,  # type: ignore[arg-type]
        epochs=epochs, lr=lr, batch=batch, device_batch=device_batch, max_steps=max_steps,
        save_every=save_every, seed=seed, dtype=dtype, checkpointing=checkpointing, lora=lora,
        on_bad=on_bad, format=format, max_length=max_length, background=colour(background),
        patch=not no_patch, workers=workers,
    )  # fmt: skip
    check_arguments(run, resume)
    processor = check_model(run)
    checked, bad_records = decided_by_main(lambda: check_data(run, processor))
    if dry_run:
        _show_plan(run, checked["good"], as_json)
        return
    start = decided_by_main(lambda: starting_checkpoint(run, resume))
    try:
        found = train(run, processor, bad_records, start, is_main())
    except BadRecord as bad:
        _stop_at_bad_record(run, str(bad))
    if is_main():
        summary = {"recipe": name, "out": str(run.out), **asdict(found), **checked}
        if as_json:
            print_json(summary)
        else:
            logger.info(_summary_text(run, summary))
    destroy_process_group()
    if found.interrupted:
        raise typer.Exit(Exit.INTERRUPTED)


def _list(as_json: bool) -> None:
    rows = [
        (r.name, r.description, f"{r.lr:g}", r.batch, f"{r.epochs:g}", r.source)
        for r in RECIPES.values()
    ]
    columns = ("recipe", "trains", "lr", "batch", "epochs", "source")
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        terminal.show("recipes", columns, rows)


def _stop_at_bad_record(run: RecipeRun, why: str) -> None:
    last, _ = checkpoints.last_complete(run.out)
    kept = "there was no checkpoint yet" if last is None else f"{last} is complete"
    stop(Exit.FAILURE, f"{why}\n{kept}; correct the record and go on with --resume")


def _show_plan(run: RecipeRun, examples: int, as_json: bool) -> None:
    chosen = run.effective_recipe
    found, config = model_class(run.model)
    with torch.device("meta"):
        empty = found(config)
    run.recipe.prepare(empty)
    steps = run.max_steps or chosen.steps(
        examples, device_batch=run.device_batch, batch=run.batch, epochs=run.epochs,
        whole=chosen.family == "blip2-retrieval",
    )  # fmt: skip
    counted = count_parameters(chosen, empty)
    plan = {
        "recipe": chosen.name, "model": found.__name__,
        "parameters": {part: {"all": n, "learn": m} for part, (n, m) in counted.items()},
        "examples": examples, "batch": run.batch or chosen.batch, "device_batch": run.device_batch,
        "processes": process_count(),
        "accumulation": chosen.accumulation(run.device_batch, batch=run.batch),
        "steps": steps, "warmup_steps": chosen.warmup_steps(steps),
        "lr": run.lr or chosen.lr, "lora": run.lora, "source": chosen.source,
    }  # fmt: skip
    if not is_main():
        return
    if as_json:
        print_json(plan)
        return
    rows = [(key, value) for key, value in plan.items() if key != "parameters"]
    for part, (every, learning) in counted.items():
        how = "by adapters" if run.lora and part == LANGUAGE else "learn"
        rows.append((part, f"{_count(learning)} of {_count(every)} parameters {how}"))
    terminal.show("what would be done", ("", ""), rows)


def _summary_text(run: RecipeRun, summary: dict[str, Any]) -> str:
    losses = summary["losses"]
    fell = "" if losses is None else f", loss {losses[0]:.4g} to {losses[1]:.4g}"
    done = f"{summary['steps']} of {summary['of']} steps{fell}"
    if summary["replaced"]:
        done += f"; another record stood in for {summary['replaced']} that could not be used"
    if summary["interrupted"]:
        return f"interrupted after {done}; {summary['checkpoint']} is complete, go on with --resume"
    return f"{done}; the model is in {run.out}"


def _count(count: int) -> str:
    """A number of parameters with three digits and a unit."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
