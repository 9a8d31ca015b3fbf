"""Whole models of transformers, before and after ``vlm_fast.patch``."""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import vlm_fast
from vlm_fast.benchmarks.before_and_after import DTYPE, compare_all, show
from vlm_fast.benchmarks.models import parts, proof
from vlm_fast.benchmarks.models.architecture import Architecture, States
from vlm_fast.benchmarks.models.blip2 import BLIP2
from vlm_fast.benchmarks.models.idefics import IDEFICS
from vlm_fast.benchmarks.models.llava import LLAVA
from vlm_fast.benchmarks.models.mllama import MLLAMA
from vlm_fast.devtools import timing

MODELS = {"llava": LLAVA, "blip2": BLIP2, "idefics": IDEFICS, "mllama": MLLAMA}


def main(
    names: Iterable[str] = MODELS, *, quick: bool = False, device: str | None = None,
    seconds: float = 10.0, deadline: float = math.inf, found: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure each part of each model for about ``seconds``, print tables, return the results.

    No model and no part is begun after ``deadline`` (of ``time.monotonic``). "finished" says
    whether all parts of a model were measured; a model that was not begun is missing. The results
    are added to ``found`` one by one, so an interrupted caller has those so far.
    """
    seconds = 0.2 if quick else seconds
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = {} if found is None else found
    with timing.one_thread():
        for name in names:
            if time.monotonic() > deadline:
                break
            size = MODELS[name].size_for(device, quick=quick)
            found[name] = measure(MODELS[name], size, device, seconds, deadline)
            gc.collect()
    return found


def measure(
    architecture: Architecture, size: str, device: str, seconds: float, deadline: float = math.inf
) -> dict[str, Any]:
    """Compare the patched model with the unpatched one, then time every part of both in turns."""
    dtype = DTYPE[device]
    model, words = architecture.build(device, dtype, size)
    given, source = architecture.inputs(model, size, architecture.batch[size])
    found: dict[str, Any] = {
        "model": words,
        "size": size,
        "photograph": source,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": architecture.batch[size],
        "sequence": given["input_ids"].shape[1],
        "proof": proof.proof(model, given, exact=size != "whole"),
    }
    rows, finished = compare_all(
        parts.parts_of(architecture, states_of(model), given), device, seconds, deadline
    )
    found |= {"rows": rows, "finished": finished}
    title = f"{words}, {found['dtype']}, batch {found['batch']}, {found['sequence']} tokens"
    show(title, rows, device)
    print(f"{source}: {proof.line(found['proof'])}\n")
    return found


def states_of(model: nn.Module) -> States:
    """The model as "before", and a patched copy that shares every tensor with it as "after"."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    patched = copy.deepcopy(model, dict(shared))  # its memo: what is in it is not copied
    vlm_fast.patch(patched, strict=True)
    return {"before": model, "after": patched}
