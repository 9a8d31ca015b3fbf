"""Providers of an op: ours, plain PyTorch, torch.compile, and libraries that compute the same.

``of(op, args, options, device)`` returns every provider of an op: a function of the op's
arguments, or the reason why it cannot run here. That a library is missing is found here; other
reasons appear at the first call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vlm_fast.benchmarks.providers import (
    attention,
    image_token_merge,
    norms,
    projectors,
    qformer,
)
from vlm_fast.benchmarks.providers.peer import Peer, Unavailable
from vlm_fast.ops.declaration import Op

OURS, EAGER = "vlm_fast", "eager"
COMPILED = {"torch.compile": None, "torch.compile (max-autotune)": "max-autotune-no-cudagraphs"}
PEERS: tuple[Peer, ...] = (
    *attention.PEERS,
    *norms.PEERS,
    *projectors.PEERS,
    *image_token_merge.PEERS,
    *qformer.PEERS,
)
NAMES = (OURS, EAGER, *COMPILED, *dict.fromkeys(peer.name for peer in PEERS))

Providers = dict[str, Callable[..., Any] | Unavailable]

__all__ = ["COMPILED", "EAGER", "NAMES", "OURS", "PEERS", "Providers", "Unavailable", "of"]


def of(
    op: Op[..., Any], args: tuple[Any, ...], options: Mapping[str, Any], device: str
) -> Providers:
    """The providers of one call of an op, ours first; those in `COMPILED` compile at first call."""
    found: Providers = {OURS: op, EAGER: op.reference}
    for name, mode in COMPILED.items():
        found[name] = torch.compile(op.reference, mode=mode)
    for peer in PEERS:
        if peer.op == op.name:
            found[peer.name] = _made(peer, args, options, device)
    return found


def _made(
    peer: Peer, args: tuple[Any, ...], options: Mapping[str, Any], device: str
) -> Callable[..., Any] | Unavailable:
    if peer.package is not None and importlib.util.find_spec(peer.package) is None:
        return Unavailable(f"{peer.package} is not installed")
    if peer.cuda_only and device == "cpu":
        return Unavailable("has kernels for GPUs only")
    try:
        return peer.make(*args, **options)
    except Unavailable as reason:
        return reason
    except Exception as error:  # a library may raise anything
        return Unavailable.because(error)
