"""One voice for all processes of a run: who talks, how a run is refused, and what all agree on."""

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
    return int(os.environ.get("RANK", 0)) == 0


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def log_to_stderr() -> None:
    """Print."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("recipe: %(message)s"))
    logger = logging.getLogger("vlm_fast")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if is_main() else logging.CRITICAL)


def usage_error(message: str, option: str | None = None) -> NoReturn:
    if not is_main():  # once is enough
        raise typer.Exit(Exit.USAGE)
    raise typer.BadParameter(message, param_hint=option)


def decided_by_main(decide: Callable[[], Any]) -> Any:
    """What the first process decides, on all of them: none goes on where that one stops."""
    if process_count() == 1:
        return decide()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    # As long as the check of a large data set takes.
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
    """The end of the process group, which NCCL wants to be told."""
    if process_count() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
