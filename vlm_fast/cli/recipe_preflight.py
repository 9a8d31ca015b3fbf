"""Checks of ``vlm-fast recipe`` before training: options, model, data and checkpoints."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from vlm_fast import terminal
from vlm_fast.cli.options import Exit, stop
from vlm_fast.cli.processes import is_main, process_count, usage_error
from vlm_fast.training.data import BadRecord, check
from vlm_fast.training.data.record_errors import RecordIssue, count_by_kind
from vlm_fast.training.recipes import checkpoints
from vlm_fast.training.recipes.run import RUN, RecipeRun, dataset_and_collator, model_class

SHOWN = 10  # bad records that are named
logger = logging.getLogger(__name__)


def check_arguments(run: RecipeRun, resume: bool) -> None:
    """Check everything that is known before a library is imported."""
    if not (run.model / "config.json").is_file():
        usage_error(f"{run.model} has no config.json, expected a folder with a model", "--model")
    if not run.data.is_file():
        usage_error(f"there is no file {run.data}", "--data")
    if not run.images.is_dir():
        usage_error(f"there is no folder {run.images}", "--images")
    if is_main() and run.out.exists() and not run.out.is_dir():
        usage_error(f"{run.out} is a file, expected a folder", "--out")
    if is_main() and not resume and run.out.is_dir() and any(run.out.iterdir()):
        usage_error(f"{run.out} is not empty: name another, or go on with --resume", "--out")
    for option, value in {"--epochs": run.epochs, "--lr": run.lr}.items():
        if value == 0:
            usage_error("is 0, expected more", option)
    if run.lora is not None and "language" not in run.recipe.trains:
        usage_error(f"{run.recipe.name} trains no language model, which adapters are for", "--lora")
    if run.format is not None and run.recipe.family.startswith("blip2"):
        usage_error(f"{run.recipe.name} learns captions, which have no format", "--format")
    for other in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{other}", "").lower() in ("1", "true"):
            usage_error(
                f"runs on DDP; for {other} use vlm_fast.training.recipes in a script of your own"
            )
    if run.recipe.family == "blip2-retrieval" and run.device_batch * process_count() < 2:
        usage_error("is 1 on 1 process, expected 2 pairs to contrast at least", "--device-batch")
    if process_count() == 1 and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys():
        logger.info(
            "accelerate launch --cpu starts one process, whatever --num_processes; for more: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ..."
        )
    try:
        run.recipe.accumulation(run.device_batch, batch=run.batch)
    except ValueError as error:
        usage_error(str(error), "--batch")


def check_model(run: RecipeRun) -> Any:
    """Check the model's family by its config alone, and load its processor."""
    from transformers import AutoProcessor

    try:
        found, config = model_class(run.model)
        with torch.device("meta"):
            run.recipe.parts(found(config))
    except (ValueError, TypeError) as error:
        usage_error(str(error), "--model")
    dtype = run.dtype or str(config.dtype).removeprefix("torch.")
    if dtype == "float16" and not torch.cuda.is_available():
        usage_error("float16 is trained in on a GPU alone; take bfloat16 or float32", "--dtype")
    try:
        processor = AutoProcessor.from_pretrained(run.model, local_files_only=True)
    except Exception as error:  # broken files of processors raise anything
        usage_error(f"{run.model} has no processor: {type(error).__name__}: {error}", "--model")
    if run.recipe.family == "blip2-retrieval" and processor.tokenizer.bos_token_id is None:
        usage_error(
            "its tokenizer has no bos_token, expected [DEC], with which texts begin", "--model"
        )
    return processor


def check_data(run: RecipeRun, processor: Any) -> tuple[dict[str, Any], list[int]]:
    """Count good records, and name bad ones; exits if they are not to be skipped.

    Returns:
        A summary for JSON, and the numbers of bad records in the file.
    """
    try:
        # Only with a maximal length can a well-formed record be unusable.
        collate = None if run.max_length is None else dataset_and_collator(run, processor)[1]
        with terminal.counter("checking data") as count:
            found = check(
                run.data, run.images, on_bad="skip", collate=collate, background=run.background,
                progress=count,
            )  # fmt: skip
    except ModuleNotFoundError as error:
        stop(Exit.ENVIRONMENT, f"{error}: pictures need Pillow (pip install pillow)")
    except (BadRecord, ValueError, OSError) as error:
        stop(Exit.FAILURE, f"{run.data}: {error}")
    bad = [issue for issue in found.issues if not issue.is_warning]
    _report(bad, found.total or 0)
    if bad and run.on_bad == "stop":
        stop(Exit.FAILURE, "nothing was trained; correct them, or leave them out: --on-bad skip")
    if not found.good:
        stop(Exit.FAILURE, f"{run.data} has no good record")
    summary = {"records": found.total, "good": found.good, "bad": count_by_kind(bad)}
    return summary, sorted({issue.index for issue in bad if issue.index is not None})


def _report(bad: list[RecordIssue], total: int) -> None:
    for issue in bad[:SHOWN]:
        logger.info(str(issue))
    if bad:
        more = f", of which {SHOWN} are shown" if len(bad) > SHOWN else ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in count_by_kind(bad).items())
        logger.info(f"{len(bad)} faults in {total} records{more}: {kinds}")


def starting_checkpoint(run: RecipeRun, resume: bool) -> Path | None:
    """The checkpoint to resume from, or None; creates the output folder."""
    try:
        run.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        usage_error(f"{run.out} cannot be made: {error.strerror}", "--out")
    if not resume:
        return None
    before = run.out / RUN
    if before.exists():
        then, now = json.loads(before.read_text()), run.fixed_settings()
        changed = [f"{k} is {now[k]!r}, was {then[k]!r}" for k in now if now[k] != then.get(k)]
        if changed:
            usage_error(f"{run.out} is of another run: {'; '.join(changed)}", "--resume")
    last, passed = checkpoints.last_complete(run.out)
    for line in passed:
        logger.info("passed over: %s", line)
        # Its list of files is wrong; training will write the files again.
        (run.out / line.split()[0] / checkpoints.FILE_LIST).unlink(missing_ok=True)
    logger.info(
        "no complete checkpoint: from the beginning" if last is None else f"from {last.name}"
    )
    return last
