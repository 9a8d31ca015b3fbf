"""The short run of ``vlm-fast bench``: a small patched LLaVA, then some ops against their peers.

It takes about two minutes on two CPU cores. The model is LLaVA of transformers with random weights,
on a photograph. The ops run at shapes of real checkpoints, one sample each on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import vlm_fast
from vlm_fast import terminal
from vlm_fast.benchmarks import machine, models, ops, providers, suite
from vlm_fast.benchmarks.models.parts import prompt
from vlm_fast.benchmarks.result_rows import Row, best_peer, by_provider, megabytes, seconds
from vlm_fast.devtools import timing

# One shape of a real checkpoint for each op that a newcomer is likely to meet.
SHAPES = {
    "mlp": "BLIP-2 Q-Former, 1 image",
    "merge_image_tokens": "1 image, 1 x 2048",
    "anyres_pack": "LLaVA-NeXT, 1 x 2928",
    "pixel_shuffle_norm": "InternVL, 13 tiles",
    "add_layer_norm": "BLIP-2 Q-Former, 1 image",
    "cross_attention": "BLIP-2, 1 image",
    "media_cross_attention": "OpenFlamingo-9B, 1 x 2048, 4 images",
    "bipartite_match": "CLIP-L/336 with CLS, 1 image",
    "merge_tokens": "CLIP-L/336, 1 image",
}
SECONDS_PER_PASS = 0.6  # shared by all providers of one pass of one op
COMPILING_ENDS = 120.0  # seconds after the ops began; what is not compiled by then is left out
MODES = ("forward", "forward+backward")
PROVIDERS = tuple(name for name in providers.NAMES if name != "torch.compile (max-autotune)")

FULL_RUN = """\
The full run adds: every op at all its shapes, also backward alone and torch.compile with
max-autotune; whole models (LLaVA-1.5-7B, BLIP-2, IDEFICS-9B, Llama-3.2-11B-Vision); Q-Formers,
AnyRes packing, patch mergers, token merging; the Python overhead of a call; every op against its
reference. It takes the better part of an hour on two cores: vlm-fast bench --full
"""


def model(run: suite.Run) -> None:
    """Patch and verify a small LLaVA, then time it without and with the patch."""
    architecture = models.MODELS["llava"]
    built, words = architecture.build(run.device, ops.DTYPE[run.device], "small")
    given, source = architecture.inputs(built, "small", architecture.batch["small"])
    print(f"1. {words}, random weights, on {source}\n")
    with timing.one_thread(), vlm_fast.patch(built) as report:
        print(report)
        print(vlm_fast.verify(built, **prompt(given)))
    print()
    run.results["models"] = found = {}
    with terminal.counter("timing LLaVA with and without the patch"):
        models.main(["llava"], quick=True, device=run.device, found=found)


def some_ops(run: suite.Run) -> None:
    """Time the ops of `SHAPES` against every provider that can compute them here."""
    print("2. Ops against plain PyTorch, torch.compile and other libraries\n")
    run.results["ops"] = rows = []
    passes = [(name, mode) for name in SHAPES for mode in modes_of(name)]
    with timing.one_thread(), terminal.counter("timing ops") as count:
        count(0, len(passes))
        for row in measured(run.device):
            rows.append(row)
            run.write(now=False)
            count(len({(r["op"], r["mode"]) for r in rows}), len(passes))
    show(rows, run.device)


def modes_of(name: str) -> Sequence[str]:
    return MODES[:1] if ops.OPS[name].returns_indices else MODES


def measured(device: str) -> Iterator[Row]:
    """Rows of `ops.measure` for the shapes of `SHAPES`."""
    deadline = time.monotonic() + COMPILING_ENDS
    selection = ops.Selection(list(SHAPES), list(SHAPES.values()), MODES, PROVIDERS)
    for row, _ in ops.measure(
        selection, device=device, seconds=SECONDS_PER_PASS, deadline=deadline,
        thorough=device != "cpu",
    ):  # fmt: skip
        yield row


def show(rows: Sequence[Row], device: str) -> None:
    """Print a line for each op and pass: ours, plain PyTorch and the fastest other provider."""
    cells = []
    for key, found in by_provider(rows).items():
        ours, eager = found[providers.OURS], found[providers.EAGER]
        best = found[best_peer(found)]
        cells.append(
            (
                key[0], key[1], key[4], seconds(ours["median"]), seconds(eager["median"]),
                f"{best['provider']}, {seconds(best['median'])}",
                f"{best['times_faster']:.2f}x, {best['ours_is']}",
                f"{megabytes(ours['peak_bytes'])} / {megabytes(eager['peak_bytes'])}",
                f"{megabytes(ours['saved_bytes'])} / {megabytes(eager['saved_bytes'])}",
            )
        )  # fmt: skip
    one = rows[0]
    where = f"{machine.name(device)}{', one thread' if device == 'cpu' else ''}"
    columns = (
        "op", "shape", "pass", "vlm_fast", "eager", "fastest other", "vlm_fast is",
        "peak memory / eager", "saved for backward / eager",
    )  # fmt: skip
    terminal.show(f"{where}, {one['dtype']}, {one['scale']}", columns, cells)
    ops.show_unavailable(rows)


SECTIONS = {"model": model, "some ops": some_ops}


def main(device: str, path: Path | None) -> dict[str, Any]:
    """Run it, print what it finds and what the full run adds; return the results."""
    start = time.monotonic()
    results = suite.run(list(SECTIONS), device=device, quick=True, path=path, table=SECTIONS)
    print(f"{time.monotonic() - start:.0f} s\n\n{FULL_RUN}")
    return results
