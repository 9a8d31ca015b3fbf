"""The Trainer callback of a recipe: progress, a file of losses, stop signals, checkpoints."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vlm_fast.signals import handled
from vlm_fast.training.recipes import checkpoints
from vlm_fast.training.recipes.blip2 import Objective

LOSSES = "losses.jsonl"
logger = logging.getLogger(__name__)


class StopSignal:
    """A signal handler that remembers the first signal. Launchers send a signal more than once.

    Attributes:
        signal_name: such as "SIGTERM"; None if no signal was received.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __call__(self, number: int, frame: Any) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            logger.info("%s: saving a checkpoint at the end of this step", self.signal_name)

    def anywhere(self, device: torch.device) -> bool:
        """Whether any rank received a signal. All ranks have to stop at the same step.

        Args:
            device: of the tensor that is reduced over ranks.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self.signal_name is not None
        flag = torch.tensor(float(self.signal_name is not None), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


@contextmanager
def stop_on_signal() -> Iterator[StopSignal]:
    """Inside, SIGINT and SIGTERM do not interrupt; they ask the run to stop after its step."""
    stop_signal = StopSignal()
    with handled(stop_signal):
        yield stop_signal


def make_callback(
    output: Path,
    stop_signal: StopSignal,
    progress: Callable[[int, int | None], None],
    trained: torch.nn.Module,
) -> Any:
    """Make the ``TrainerCallback`` of a recipe.

    Args:
        output: the folder of checkpoints and of ``losses.jsonl``.
        stop_signal: is asked after each step whether to stop.
        progress: called with the number of finished steps and the number of all steps.
        trained: the module that is trained; the loss terms of an `Objective` are logged too.
    """
    from transformers import TrainerCallback

    class RecipeCallback(TrainerCallback):
        def __init__(self) -> None:
            self.interrupted = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            progress(state.global_step, state.max_steps)
            # drops rows that an interrupted run logged after its last checkpoint
            if state.is_world_process_zero:
                rows = [row for row in state.log_history if "loss" in row]
                (output / LOSSES).write_text("".join(map(_line, rows)))

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            progress(state.global_step, state.max_steps)
            if stop_signal.anywhere(args.device) and state.global_step < state.max_steps:
                self.interrupted = True
                control.should_save = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if "loss" not in others["logs"]:
                return
            if isinstance(trained, Objective):
                terms = {name: loss.item() for name, loss in trained.losses.items()}
                state.log_history[-1].update(terms)
            if state.is_world_process_zero:
                row = state.log_history[-1]
                with (output / LOSSES).open("a") as file:
                    file.write(_line(row))
                logger.info(
                    "step %s of %s: loss %.4g, learning rate %.3g",
                    row["step"], state.max_steps, row["loss"], row["learning_rate"],
                )  # fmt: skip

        def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if dist.is_available() and dist.is_initialized():
                dist.barrier()  # wait until every rank has written its files
            if state.is_world_process_zero:
                checkpoints.mark_complete(output / f"checkpoint-{state.global_step}")
                checkpoints.rotate(output)

    return RecipeCallback()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True) + "\n"
