"""The tanh gate of Flamingo's cross-attention, with the residual and the norm that follows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels import gated_add as kernels
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.ops.declaration import FLOATS, Cost, nbytes, op

MAX_FEATURES = 8192
NORMS = ("layer", "rms")


@op
def gated_add(x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """``x + tanh(gate) * y``, with y taken as zeros in the rows that ``row_mask`` hides.

    Flamingo, arXiv 2204.14198, section 3.1.2. Mirrors transformers'
    ``IdeficsGatedCrossAttentionLayer`` and ``MllamaCrossAttentionDecoderLayer``.

    Args:
        x, y: ``(..., features)``, of one shape and dtype; rows at any pitch are not copied.
        gate: of one element, or ``(..., features)`` with all other sizes 1; of x's dtype or fp32.
            NaN and the infinities of y come through even where it is 0.
        row_mask: bool ``x.shape[:-1]`` or None, False where y is hidden, whatever it holds.

    More than 8192 features, and dtypes other than fp32, fp16 and bf16, fall back. Returns the shape
    and dtype of x.

    Raises:
        TypeError: an argument is no tensor, not floating, or of a dtype not named here.
        ValueError: shapes do not fit, or devices differ.
    """
    if row_mask is not None:
        y = torch.where(row_mask.unsqueeze(-1), y, 0)
    return x + (gate.tanh().view(-1) * y).to(x.dtype)


@op
def gated_add_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    row_mask: Tensor | None = None,
    *,
    eps: float = 1e-5,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """``h = gated_add(x, y, gate, row_mask)`` and its norm, in one pass.

    Args:
        x, y, gate, row_mask: as of `gated_add`.
        weight: ``(features,)``, of x's dtype or fp32.
        bias: like weight, or None; LayerNorm's only.
        eps: added to the variance, or to the mean square.
        norm: "layer" (arXiv 1607.06450), or "rms" (arXiv 1910.07467) in Llama's form, rounded to
            x's dtype before the weight.

    Statistics are fp32. Returns h and its norm, of x's shape and dtype.

    Raises:
        TypeError: an argument is no tensor, not floating, or of a dtype not named here.
        ValueError: shapes do not fit, devices differ, or ``norm`` is unknown.
    """
    h = gated_add.reference(x, y, gate, row_mask)
    features = h.shape[-1]
    if norm == "layer":
        bias = None if bias is None else bias.to(h.dtype)
        return h, F.layer_norm(h, (features,), weight.to(h.dtype), bias, eps)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return h, (weight * unit.to(h.dtype)).to(h.dtype)


@gated_add.accepts
def accepts(x, y, gate, row_mask):
    mistake = _mistake("gated_add", x, y, gate, row_mask)
    if mistake is not None:
        raise mistake
    return x, y, gate, row_mask


@gated_add_norm.accepts
def accepts_norm(x, y, gate, weight, bias, row_mask, *, eps, norm):
    name = "gated_add_norm"
    mistake = _mistake(name, x, y, gate, row_mask)
    mistake = mistake or _mistake_of_norm(name, x, weight, bias, norm)
    if mistake is not None:
        raise mistake
    return x, y, gate, weight, bias, row_mask


def _mistake(name, x, y, gate, row_mask):
    named = dict(x=x, y=y, gate=gate, row_mask=row_mask)
    for argument, value in named.items():
        if not isinstance(value, Tensor) and not (value is None and argument == "row_mask"):
            return not_a_tensor(name, argument, value)
    if x.ndim < 1:
        return wrong_value(name, "x", x, "(..., features)")
    features = x.shape[-1]
    if y.shape != x.shape:
        return wrong_value(name, "y", y, f"{tuple(x.shape)} as x has")
    if gate.numel() != 1 and gate.shape != (1,) * (gate.ndim - 1) + (features,):
        wanted = f"one element, or ({features},) to match x"
        return wrong_value(name, "gate", gate, wanted)
    if row_mask is not None and row_mask.shape != x.shape[:-1]:
        return wrong_value(name, "row_mask", row_mask, f"{tuple(x.shape[:-1])}, one for each row")
    if not x.is_floating_point():
        return wrong_type(name, "x", x, "a floating dtype (float32, bfloat16 or float16)")
    if y.dtype != x.dtype:
        return wrong_type(name, "y", y, f"{x.dtype} as x has")
    if gate.dtype not in (x.dtype, torch.float32):
        return wrong_type(name, "gate", gate, f"{x.dtype} as x has, or torch.float32")
    if row_mask is not None and row_mask.dtype != torch.bool:
        return wrong_type(name, "row_mask", row_mask, "torch.bool")
    return _elsewhere(name, x, named)


def _mistake_of_norm(name, x, weight, bias, norm):
    named = dict(weight=weight, bias=bias)
    for argument, value in named.items():
        if not isinstance(value, Tensor) and not (value is None and argument == "bias"):
            return not_a_tensor(name, argument, value)
    if norm not in NORMS:
        return wrong_value(name, "norm", norm, f"one of {NORMS}")
    if norm == "rms" and bias is not None:
        return wrong_value(name, "bias", bias, "None, of an RMSNorm")
    for argument, value in named.items():
        if value is not None and value.shape != x.shape[-1:]:
            return wrong_value(name, argument, value, f"{tuple(x.shape[-1:])} to match x")
    if weight.dtype not in (x.dtype, torch.float32):
        return wrong_type(name, "weight", weight, f"{x.dtype} as x has, or torch.float32")
    if bias is not None and bias.dtype != weight.dtype:
        return wrong_type(name, "bias", bias, f"{weight.dtype} as weight has")
    return _elsewhere(name, x, named)


def _elsewhere(name, x, named):
    for argument, value in named.items():
        if value is not None and value.device != x.device:
            return wrong_value(name, argument, value, f"{x.device}, where x is")
    return None


@gated_add.requires
def requires(x, y, gate, row_mask):
    return _why_not(x)


@gated_add_norm.requires
def requires_norm(x, y, gate, weight, bias, row_mask, *, eps, norm):
    return _why_not(x)


def _why_not(x):
    if x.dtype not in FLOATS:
        return f"{x.dtype} has no kernels here (float32, bfloat16 and float16 have)"
    if x.shape[-1] > MAX_FEATURES:
        return f"{x.shape[-1]} features are more than {MAX_FEATURES}, a row a program holds"
    return None


@gated_add.forward
def forward(needs, x, y, gate, row_mask):
    if x.numel() == 0:
        h = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        h = kernels.gated_add(x, y, gate.contiguous(), row_mask)[0]
    if not any(needs):
        return h, ()
    return h, (y if needs.gate else None, gate if needs.gate or needs.y else None, row_mask)


@gated_add.backward
def backward(needs, kept, dh):
    y, gate, row_mask = kept
    dy = dgate = None
    if gate is not None:
        _, dy, dgate, _, _ = _gradients(
            needs, dh, None, None, (None, None), y, gate, row_mask, None, "none"
        )
    return dh if needs.x else None, dy, dgate, None


@gated_add_norm.forward
def forward_norm(needs, x, y, gate, weight, bias, row_mask, *, eps, norm):
    normed: Tensor | None
    statistics: kernels.Statistics = (None, None)
    if x.numel() == 0:
        h = torch.empty_like(x, memory_format=torch.contiguous_format)
        normed = torch.empty_like(h)
    else:
        h, normed, statistics = kernels.gated_add(
            x, y, gate.contiguous(), row_mask, weight.contiguous(),
            None if bias is None else bias.contiguous(), eps=eps, norm=norm,
        )  # fmt: skip
    if not any(needs):
        return (h, normed), ()
    inner = needs.x or needs.y or needs.gate or needs.weight
    return (h, normed), (
        y if needs.gate else None, gate, row_mask, weight, h if inner else None,
        *(statistics if inner else (None, None)), bias.new_empty(0) if needs.bias else None,
    )  # fmt: skip


@gated_add_norm.backward
def backward_norm(needs, kept, dh, dnormed, *, eps, norm):
    y, gate, row_mask, weight, h, mean, rstd, bias_like = kept
    if h is None:  # the bias alone
        dbias = dnormed.sum_to_size(dnormed.shape[-1:]).to(bias_like.dtype)
        return None, None, None, None, dbias, None
    dx, dy, dgate, dweight, dbias = _gradients(
        needs, dh, dnormed, h, (mean, rstd), y, gate, row_mask, weight, norm
    )
    return (
        dx, dy, dgate,
        dweight.to(weight.dtype) if needs.weight else None,
        dbias.to(bias_like.dtype) if needs.bias else None,
        None,
    )  # fmt: skip


@gated_add_norm.constants
def constants_norm(needs):
    return () if needs.x or needs.y or needs.gate else (0,)  # h knows no weight and no bias


def _gradients(needs, dh, dnormed, h, statistics, y, gate, row_mask, weight, norm):
    """Those that are wanted, None for the others; of x, y, gate, weight and bias."""
    features = dh.shape[-1]
    if dh.numel() == 0:
        zeros = dh.new_zeros(features)
        dgate = torch.zeros_like(gate) if needs.gate else None
        return dh, dh, dgate, zeros, zeros.clone()
    dx, dy, dgate, dweight, dbias = kernels.gated_add_backward(
        dh, dnormed, h, statistics, y, gate.contiguous(), row_mask,
        None if weight is None else weight.contiguous(), norm=norm,
        want_x=needs.x and norm != "none", want_y=needs.y, want_gate=needs.gate,
        want_weight=getattr(needs, "weight", False), want_bias=getattr(needs, "bias", False),
    )  # fmt: skip
    return (
        dx, dy,
        None if dgate is None else dgate.view(gate.shape).to(gate.dtype),
        dweight, dbias,
    )  # fmt: skip


@gated_add.cost
def cost(x, y, gate, row_mask):
    rows = nbytes(x)
    return Cost(
        forward_flops=2 * x.numel(),
        forward_bytes=3 * rows + nbytes(gate, row_mask),
        backward_flops=3 * x.numel(),
        backward_bytes=3 * rows + 2 * nbytes(gate) + nbytes(row_mask),
    )


@gated_add_norm.cost
def cost_norm(x, y, gate, weight, bias, row_mask, *, eps, norm):
    rows, beside = nbytes(x), nbytes(gate, weight, bias)
    return Cost(
        forward_flops=9 * x.numel(),
        forward_bytes=4 * rows + beside + nbytes(row_mask),
        backward_flops=15 * x.numel(),
        backward_bytes=6 * rows + 2 * beside + nbytes(row_mask),
    )


@gated_add.inputs(
    test=[
        dict(shape=(1, 1)),
        dict(shape=(3, 17), per_feature=True),
        dict(shape=(3, 17, 24), drop_first=1, hidden=True),
        dict(shape=(5, 1152)),
    ],
    bench={
        "Flamingo, 8 x 2048, 4096 wide": dict(shape=(8, 2048, 4096)),
        "a step of 8, 4096 wide": dict(shape=(8, 1, 4096)),
        "Llama-3.2-11B-Vision, 4 x 512": dict(shape=(4, 512, 4096), hidden=True),
    },
)
def inputs(shape, **others):
    return _inputs(shape, **others)


def _inputs(shape, *, drop_first=0, per_feature=False, hidden=False):
    x, y = torch.randn(shape), torch.randn(shape)
    if drop_first:
        x, y = x[..., drop_first:, :], y[..., :-drop_first, :]
    gate = torch.randn(shape[-1]) if per_feature else torch.full((1,), 0.4)
    row_mask = None
    if hidden:
        rows = x.shape[:-1].numel()
        row_mask = (torch.arange(rows) % 3 != 1).view(x.shape[:-1])
    return x, y, gate, row_mask


@gated_add_norm.inputs(
    test=[
        dict(shape=(1, 1), eps=0.01, biased=True),
        dict(shape=(3, 17), per_feature=True, norm="rms"),
        dict(shape=(40, 100), biased=True),
        dict(shape=(3, 17, 24), drop_first=1, hidden=True, norm="rms"),
        dict(shape=(2, 5, 72), hidden=True),
        dict(shape=(3, 1152), biased=True),
    ],
    bench={
        "Llama-3.2-11B-Vision, 4 x 512": dict(shape=(4, 512, 4096), norm="rms"),
        "Flamingo, 8 x 2048, 4096 wide": dict(shape=(8, 2048, 4096), biased=True),
        "OpenFlamingo-3B, 8 x 2048, 2048 wide": dict(shape=(8, 2048, 2048), biased=True),
        "IDEFICS-9B, a step of 8": dict(shape=(8, 1, 4096), norm="rms"),
    },
)
def inputs_norm(shape, *, biased=False, **others):
    x, y, gate, row_mask = _inputs(shape, **others)
    weight = 1 + torch.randn(shape[-1]) * 0.1
    return x, y, gate, weight, torch.randn(shape[-1]) * 0.1 if biased else None, row_mask
