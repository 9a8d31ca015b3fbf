"""Multi-layer perceptrons of QuACK, flash-attn, TransformerEngine and Liger.

Most libraries fuse the tanh form of GELU, which is another function; the name of such a provider
says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vlm_fast.benchmarks.providers.peer import Peer, Unavailable

TANH = ("gelu", "gelu_tanh")  # where another GELU is near enough to be timed beside ours


def activation_among(*known: str) -> Callable[[dict[str, Any], str], str]:
    def check(options: dict[str, Any], default: str) -> str:
        activation: str = options.get("activation", default)
        if activation not in known:
            raise Unavailable(f"has no {activation}")
        return activation

    return check


def quack(*args: Any, **options: Any) -> Callable[..., Any]:
    activation_among("gelu")(options, "gelu")
    theirs: Any = importlib.import_module("quack.mlp")

    def call(
        x: Tensor, weight_1: Tensor, bias_1: Any, weight_2: Tensor, bias_2: Any, **_: Any
    ) -> Tensor:
        found: Tensor = theirs.mlp_func(x, weight_1, weight_2, "gelu_erf", bias_1, bias_2)
        return found

    return call


def flash_attn(*args: Any, **options: Any) -> Callable[..., Any]:
    activation_among(*TANH)(options, "gelu")
    theirs: Any = importlib.import_module("flash_attn.ops.fused_dense")

    def call(
        x: Tensor, weight_1: Tensor, bias_1: Any, weight_2: Tensor, bias_2: Any, **_: Any
    ) -> Tensor:
        found: Tensor = theirs.fused_mlp_func(
            x.contiguous(), weight_1, weight_2, bias_1, bias_2, activation="gelu_approx"
        )
        return found

    return call


def transformer_engine(*args: Any, **options: Any) -> Callable[..., Any]:
    raise Unavailable("LayerNormMLP has its norm inside: no MLP alone to be timed")


def liger_glu(*args: Any, **options: Any) -> Callable[..., Any]:
    activation = activation_among("silu", "gelu_tanh")(options, "silu")
    if activation == "silu":
        ops: Any = importlib.import_module("liger_kernel.ops.swiglu")
        product = ops.LigerSiLUMulFunction.apply
    else:
        ops = importlib.import_module("liger_kernel.ops.geglu")
        product = ops.LigerGELUMulFunction.apply

    def call(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, **_: Any) -> Tensor:
        return F.linear(product(F.linear(x, gate), F.linear(x, up)), down)

    return call


PEERS = (
    Peer("QuACK", "mlp", quack, package="quack", cuda_only=True),
    Peer("flash-attn (tanh)", "mlp", flash_attn, package="flash_attn", cuda_only=True, same=False),
    Peer(
        "TransformerEngine", "mlp", transformer_engine, package="transformer_engine", cuda_only=True
    ),
    Peer("Liger", "gated_mlp", liger_glu, package="liger_kernel", cuda_only=True),
)
