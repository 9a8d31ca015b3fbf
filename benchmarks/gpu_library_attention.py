"""Whether PyTorch's attention keeps what `cross_attention` promises, where a library could serve.

`cross_attention` launches its own kernels for every call. For plain queries, keys and values (no
second source, bias, mask or dropout) the same is computed by `scaled_dot_product_attention`, with
flash attention or cuDNN. What it must keep to be called instead can be seen on a GPU only: results
within the op's tolerance, the same bits in each call, memory with tokens before heads, zeros where
all scores are -Inf, and CUDA graphs. The times of both are rows of the ops.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlm_fast.benchmarks import gpu_checks, ops, providers
from vlm_fast.benchmarks.providers import Unavailable
from vlm_fast.devtools.passes import step, with_upstream
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import tolerance
from vlm_fast.verification.self_test import one_sample

LIBRARIES = ("SDPA (flash)", "SDPA (cuDNN)")
REPEATS = 10
Function = Callable[..., Any]


def evidence(device: str, deadline: float, *, quick: bool = False) -> list[dict[str, Any]]:
    """A row per plain shape of `cross_attention` and library, until the deadline."""
    op, found = OPS["cross_attention"], []
    for label, shape in ops.shapes_of(op, device, quick=quick):
        torch.manual_seed(0)
        args, options = op.sample(one_sample(shape), ops.DTYPE[device], device)
        served = providers.of(op, args, options, device)
        for name in LIBRARIES:
            if time.monotonic() > deadline:
                return found
            function = served[name]
            row: dict[str, Any] = {"shape": label, "provider": name}
            if not isinstance(function, Unavailable):
                try:
                    row |= properties(function, args, options, device)
                except Exception as error:  # the library takes no such call
                    function = Unavailable.because(error)
            if isinstance(function, Unavailable):
                row["reason"] = str(function)
            found.append(row)
    return found


def properties(
    library: Function, args: tuple[Any, ...], options: Mapping[str, Any], device: str
) -> dict[str, Any]:
    """What a library keeps of the op's promises for one call."""
    op = OPS["cross_attention"]
    verdicts = tolerance.check(op, args, options, fast=library, inference=True)
    inputs = with_upstream(op, args, options)
    first = step(library, inputs, options)
    again = (step(library, inputs, options) for _ in range(REPEATS - 1))
    return {
        "failures": [str(verdict.failure) for verdict in verdicts if not verdict.ok],
        "same_bits": all(gpu_checks.equal(first, found) for found in again),
        "tokens_before_heads": first[0].transpose(1, 2).is_contiguous(),
        "zeros_without_scores": _zeros_without_scores(library, args, options),
        "captured": device != "cpu" and _captured(library, inputs, options, first),
    }


def _zeros_without_scores(
    library: Function, args: tuple[Any, ...], options: Mapping[str, Any]
) -> bool:
    """Whether a query whose scores are all -Inf gives zeros, as of the op."""
    q, k, v, *rest = (a.detach().clone() if isinstance(a, Tensor) else a for a in args)
    k[..., 0] = k[..., 0].abs() + 1
    q[:, :, 0], q[:, :, 0, 0] = 0, -torch.inf
    with torch.no_grad():
        return bool((library(q, k, v, *rest, **options)[:, :, 0] == 0).all())


def _captured(
    library: Function, inputs: tuple[Any, ...], options: Mapping[str, Any], expected: list[Tensor]
) -> bool:
    try:
        graph, found = gpu_checks.captured(lambda: step(library, inputs, options))
    except RuntimeError:
        return False
    graph.replay()
    torch.cuda.synchronize()
    return gpu_checks.equal(found, expected)
