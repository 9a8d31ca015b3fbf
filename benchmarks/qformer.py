"""BLIP-2's Q-Former of transformers, without and with ``vlm_fast.patch``."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import vlm_fast
from benchmarks import machine
from vlm_fast import tables
from vlm_fast.measure import memory, timing
from vlm_fast.modules import QFormer

Row = dict[str, Any]
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
BATCH = {"cpu": (4,), "cuda": (1, 64, 8)}  # in order of worth
# (name, keys, width of the image features, text tokens)
SHAPES = (
    ("BLIP-2", 257, 1408, 0),
    ("BLIP-2 with ViT-L", 257, 1024, 0),
    ("BLIP-2 at 364 px", 677, 1408, 0),
    ("1025 keys", 1025, 1408, 0),
    ("InstructBLIP, 64 text tokens", 257, 1408, 64),
)


def model(width: int, text: int) -> nn.Module:
    """The Q-Former of its default config, with random weights."""
    if text:
        from transformers import InstructBlipQFormerConfig
        from transformers.models.instructblip.modeling_instructblip import (
            InstructBlipQFormerModel,
        )

        return InstructBlipQFormerModel(InstructBlipQFormerConfig(encoder_hidden_size=width)).eval()
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    return Blip2QFormerModel(Blip2QFormerConfig(encoder_hidden_size=width)).eval()


def inputs(
    batch: int, keys: int, width: int, text: int, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """As the whole model calls it: one set of queries for all, a mask that hides nothing."""
    query = torch.randn(1, 32, 768, device=device, dtype=dtype)
    given = dict(
        query_embeds=query.expand(batch, -1, -1),
        encoder_hidden_states=torch.randn(batch, keys, width, device=device, dtype=dtype),
        encoder_attention_mask=torch.ones(batch, keys, dtype=torch.long, device=device),
    )
    if text:
        given["input_ids"] = torch.randint(5, 999, (batch, text), device=device)
        given["attention_mask"] = torch.ones(batch, 32 + text, dtype=torch.long, device=device)
    return given


def main(
    *, quick: bool = False, device: str | None = None, seconds: float = 40.0,
    deadline: float = math.inf,
) -> dict[str, Any]:  # fmt: skip
    """Measure, about ``seconds`` a part, print a table, and return what was found.

    No model is begun after ``deadline`` (of ``time.monotonic``); "finished" says whether all were.
    """
    seconds = 0.2 if quick else seconds if device == "cpu" else seconds / 8
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPE[device]
    shapes = SHAPES[:1] if device == "cpu" or quick else SHAPES
    rows: list[Row] = []
    finished = True
    with timing.one_thread():
        for name, keys, width, text in shapes:
            torch.manual_seed(0)
            before = model(width, text).to(device, dtype)
            after = copy.deepcopy(before)
            vlm_fast.patch(after, strict=True)
            for batch in BATCH[device]:
                if time.monotonic() > deadline:
                    finished = False
                    break
                given = inputs(batch, keys, width, text, device, dtype)
                rows += compare(f"{name}, batch {batch}", before, after, given, device, seconds)
    found = {"rows": rows, "dtype": str(dtype).removeprefix("torch."), "finished": finished}
    show(found, device)
    return found


def compare(
    name: str, before: nn.Module, after: nn.Module, given: dict[str, Tensor],
    device: str, seconds: float,
) -> list[Row]:  # fmt: skip
    """Forward and training step, in turns; on a GPU compiled and graphed forwards too."""

    def forward(called: Callable[..., Any]) -> Callable[[], Any]:
        return torch.no_grad()(lambda: called(**given).last_hidden_state)

    def step(called: nn.Module, given: dict[str, Tensor] = given) -> Callable[[], Any]:
        def run() -> None:
            called.zero_grad(set_to_none=True)
            given["encoder_hidden_states"].grad = None
            called(**given).last_hidden_state.backward(upstream)

        return run

    image = given["encoder_hidden_states"].detach().requires_grad_()
    trained = {**given, "encoder_hidden_states": image}

    # Random: through the last LayerNorm, equal gradients are zeros, and their rounding subnormal.
    with torch.no_grad():
        upstream = torch.randn_like(before(**given).last_hidden_state)
    states = {"before": before, "after": after}
    parts: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {state: forward(called) for state, called in states.items()},
        "training step": {state: step(called) for state, called in states.items()},
        "training step, encoder too": {
            state: step(called, trained) for state, called in states.items()
        },
    }
    if device == "cuda":
        torch._dynamo.reset()
        compiled = torch.compile(before, mode="reduce-overhead")
        parts["forward"]["compiled"] = forward(compiled)
        parts["training step"]["compiled"] = step(torch.compile(before))
        if "input_ids" not in given:
            sample = given["query_embeds"].contiguous(), given["encoder_hidden_states"]
            graphed = QFormer.of(copy.deepcopy(before)).eval().capture_graph(*sample)
            parts["forward"]["graphed"] = lambda: graphed(*sample)
    tensors = [*before.parameters(), *after.parameters(), *given.values()]
    rows = []
    for part, calls in parts.items():
        times = timing.interleaved(
            calls, [()], device=device, seconds=seconds, rounds=(3, 100), wall=True
        )
        for state in calls:
            training = part == "training step"
            rows.append(
                {
                    "part": f"{name}, {part}",
                    "state": state,
                    **asdict(times[state]),
                    "ratio": times["before"].median / times[state].median,
                    "saved_bytes": _saved(states[state], given, tensors)
                    if training and state in states
                    else 0,
                    "ours_is": timing.verdict(times[state], times["before"]),
                }
            )
    return rows


def _saved(called: nn.Module, given: dict[str, Tensor], known: list[Tensor]) -> int:
    return memory.saved_bytes(lambda: called(**given).last_hidden_state, known)


def show(found: dict[str, Any], device: str) -> None:
    threads = ", one thread" if device == "cpu" else ""
    columns = ("part", "", "median", "quartiles", "times faster", "saved MB", "is")
    cells = [
        (
            row["part"],
            row["state"],
            f"{row['median'] * 1e3:.2f} ms",
            f"{row['lower'] * 1e3:.2f}-{row['upper'] * 1e3:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['saved_bytes'] / 1e6:.1f}" if row["saved_bytes"] else "",
            row["ours_is"],
        )
        for row in found["rows"]
    ]
    tables.show(f"Q-Former, {found['dtype']}, on {machine.name(device)}{threads}", columns, cells)
