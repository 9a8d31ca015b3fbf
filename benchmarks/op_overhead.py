"""The CPU time that a call of an op takes in Python beyond plain ATen, at tiny shapes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast import ops, terminal
from vlm_fast.devtools import timing
from vlm_fast.verification.tolerance import convert, differentiable

Row = dict[str, Any]
CALLS = 300  # in a run, because the clock of the process is too coarse for one call
MODES = ("no gradients", "forward for gradients", "forward+backward")


def plain_mlp(
    x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor
) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight_1, bias_1)), weight_2, bias_2)


def plain_merge(embeds: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    return embeds.masked_scatter(mask.unsqueeze(-1), features)


def main(*, quick: bool = False, device: str = "cpu") -> list[Row]:
    """Measure, print a table, and return the rows."""
    rows = measure(runs=5 if quick else 60, device=device)
    cells = [
        (row["op"], row["mode"], *(f"{row[k]:.1f}" for k in ("ours_us", "plain_us", "extra_us")))
        for row in rows
    ]
    title = "overhead in microseconds of CPU time a call, best of interleaved runs"
    terminal.show(title, ("op", "", "ours", "plain ATen", "extra"), cells)
    return rows


def measure(*, runs: int, device: str) -> list[Row]:
    """Return the best of ``runs`` of each call; other work on the machine can only add time."""
    torch.manual_seed(0)
    mask = torch.zeros(1, 8, dtype=torch.bool)
    mask[0, 2:6] = True
    sizes = ((4, 8), (8, 8), (8,), (8, 8), (8,))
    cases: dict[str, tuple[Any, Any, tuple[Tensor, ...]]] = {
        "mlp": (ops.mlp, plain_mlp, tuple(torch.randn(size) for size in sizes)),
        "merge_image_tokens": (
            ops.merge_image_tokens, plain_merge, (torch.randn(1, 8, 8), torch.randn(1, 4, 8), mask),
        ),
    }  # fmt: skip
    rows = []
    with timing.one_thread():
        for name, (ours, plain, args) in cases.items():
            args = tuple(a.to(device) for a in args)
            for mode in MODES:
                best = _best([_repeat(f, args, mode) for f in (ours, plain)], runs, device)
                ours_us, plain_us = (seconds / CALLS * 1e6 for seconds in best)
                rows.append(
                    {
                        "op": name, "mode": mode, "ours_us": ours_us, "plain_us": plain_us,
                        "extra_us": ours_us - plain_us,
                    }
                )  # fmt: skip
    return rows


def _repeat(function: Callable[..., Tensor], args: tuple[Tensor, ...], mode: str) -> Any:
    leaves = args if mode == MODES[0] else convert(args, lambda t: t.detach().requires_grad_())
    wanted, dy = differentiable(leaves), torch.ones_like(function(*args))

    def forward() -> None:
        for _ in range(CALLS):
            function(*leaves)

    def both() -> None:
        for _ in range(CALLS):
            torch.autograd.grad(function(*leaves), wanted, dy)

    return both if mode == MODES[2] else forward


def _best(calls: list[Callable[[], None]], runs: int, device: str) -> list[float]:
    best = [float("inf")] * len(calls)
    for _ in range(runs):
        for i, call in enumerate(calls):
            timing.wait(device)  # with a full queue, launches would wait for the GPU
            start = time.process_time()
            call()
            best[i] = min(best[i], time.process_time() - start)
    return best
