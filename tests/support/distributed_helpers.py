"""Runs checks on several gloo processes, which are started once because starting is slow.

They are forked from one server that has imported all modules, once per test session, and run
the group sizes one after the other.
"""

from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What ranks need; importing it starts no thread, which a fork would lose.
PRELOAD = [
    "pytest", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch._dynamo",
    *(f"transformers.models.{f}.modeling_{f}" for f in ("blip_2", "idefics", "llava", "mllama")),
    "peft", "vlm_fast",
]  # fmt: skip


def on_ranks(
    folder: Path, checks: Iterable[tuple[Callable[..., None], ...]], worlds: Iterable[int] = (2,)
) -> None:
    """Call ``function(rank, world, *arguments)`` for each check on all ranks of each group size.

    A check that fails or a rank that dies fails the test, with the trace of the rank. A check that
    waits for a rank that does not come fails within a minute.
    """
    worlds = tuple(worlds)
    start(_rank, (str(folder), list(checks), worlds), max(worlds))


def start(
    function: Callable[..., None], arguments: tuple[Any, ...], count: int, *, join: bool = True
) -> Any:
    """``function(number, *arguments)`` in ``count`` processes, forked from the server."""
    mp.get_context("forkserver").set_forkserver_preload(PRELOAD)
    return mp.start_processes(function, arguments, count, join=join, start_method="forkserver")


def _rank(rank: int, folder: str, checks: list[Any], worlds: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    for world in worlds:
        if rank < world:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/ranks-{world}", rank=rank, world_size=world,
                timeout=timedelta(minutes=1),
            )  # fmt: skip
            for function, *arguments in checks:
                function(rank, world, *arguments)
            dist.barrier()  # gloo aborts a process whose peer has gone amid a collective
            dist.destroy_process_group()
