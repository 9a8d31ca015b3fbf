"""Several processes of one recipe: who prints, how errors end all of them, and shared decisions."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch
import typer

from vlm_fast.cli.options import Exit


def is_main() -> bool:
    """Whether this is the first process, by the launcher's RANK."""
    return int(os.environ.get("RANK", 0)) == 0


def process_count() -> int:
    """Number of processes, by the launcher's WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", 1))


def log_to_stderr() -> None:
    """Print log messages of the package on stderr, in the first process only."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("recipe: %(message)s"))
    logger = logging.getLogger("vlm_fast")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if is_main() else logging.CRITICAL)


def usage_error(message: str, option: str | None = None) -> NoReturn:
    """Exit with a usage error; only the first process prints it."""
    if not is_main():
        raise typer.Exit(Exit.USAGE)
    raise typer.BadParameter(message, param_hint=option)


def decided_by_main(decide: Callable[[], Any]) -> Any:
    """Call ``decide`` in the first process and broadcast the result; all exit if it exits."""
    if process_count() == 1:
        return decide()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    # Checking a large dataset can take hours.
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=4))
    verdict: list[Any] = [None, int(Exit.FAILURE)]
    try:
        if is_main():
            verdict = [decide(), None]
    except typer.Exit as error:
        verdict = [None, error.exit_code]
    except typer.BadParameter as error:
        error.show()
        verdict = [None, int(Exit.USAGE)]
    finally:
        broadcast_object_list(verdict)
    if verdict[1] is not None:
        raise typer.Exit(verdict[1])
    return verdict[0]


def destroy_process_group() -> None:
    """End the process group, if there is one; NCCL warns if it is not ended."""
    if process_count() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
