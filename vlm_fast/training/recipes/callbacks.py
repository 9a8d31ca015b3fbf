"""What a run tells and minds while Trainer trains: progress, losses, signals, whole checkpoints."""

from __future__ import annotations

import json
import signal
import sys
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


class StopSignal:
    """Whether a signal came; a launcher sends each more than once, so the first is what counts."""

    def __init__(self) -> None:
        self.came: str | None = None

    def __call__(self, number: int, frame: Any) -> None:
        if self.came is None:
            self.came = signal.Signals(number).name
            print(
                f"recipe: {self.came}: saving a checkpoint at the end of this step",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def anywhere(self, device: torch.device) -> bool:
        """Whether it came on any rank: all have to stop at the same step."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.came is not None
        flag = torch.tensor(float(self.came is not None), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


@contextmanager
def stop_on_signal() -> Iterator[StopSignal]:
    """SIGINT and SIGTERM end a run after its step, with a checkpoint."""
    interruption = StopSignal()
    with handled(interruption):
        yield interruption


def callback(
    output: Path,
    interruption: StopSignal,
    count: Callable[[int, int | None], None],
    trained: torch.nn.Module,
) -> Any:
    """A ``TrainerCallback`` of all this."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.interrupted = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            count(state.global_step, state.max_steps)
            if state.is_world_process_zero:  # what an interrupted run logged after its checkpoint
                rows = [row for row in state.log_history if "loss" in row]
                (output / LOSSES).write_text("".join(map(_line, rows)))

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            count(state.global_step, state.max_steps)
            if interruption.anywhere(args.device) and state.global_step < state.max_steps:
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
                print(
                    f"recipe: step {row['step']} of {state.max_steps}: loss {row['loss']:.4g}, "
                    f"learning rate {row['learning_rate']:.3g}",
                    file=sys.stderr, flush=True,
                )  # fmt: skip

        def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if dist.is_available() and dist.is_initialized():
                dist.barrier()  # until every rank has written its own
            if state.is_world_process_zero:
                checkpoints.mark_complete(output / f"checkpoint-{state.global_step}")
                checkpoints.rotate(output)

    return Watch()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True) + "\n"
