"""Self-attention with its projections: one GEMM for queries, keys and values, one kernel after."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels._cross_attention_aten import bias_gradient
from vlm_fast.kernels._packed_weights import input_gradient, linears, parameter_gradients
from vlm_fast.kernels.cross_attention import attention_backward, attention_forward
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.ops.cross_attention import MAX_HEAD_SIZE, cross_attention, score_scale
from vlm_fast.ops.declaration import FLOATS, Cost, linear_op, nbytes


@linear_op
def self_attention(
    x: Tensor,
    parameters: list[Tensor],
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    heads: int,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``cross_attention(q, k, v)`` with q, k and v three linears of ``x``.

    Mirrors the self-attention of transformers' ``Blip2QFormerMultiHeadAttention``. On a GPU the
    three weights are put together for each pass, and not kept.

    Args:
        x: ``(batch, tokens, width)``.
        parameters: query, key and value weights ``(heads * d, width)``, then their biases
            ``(heads * d,)``.
        bias: added to the scores, broadcast to ``(batch, heads, tokens, tokens)``. With a gradient,
            that of all scores is formed.
        key_mask: bool ``(batch, tokens)``, True where a token is seen; a query seeing none gives 0.
        seed: one int64, for dropout of probabilities (see `vlm_fast.kernels._dropout`).
        heads: how many the features are split into, of at most 128 each; else it falls back.
        scale: of the scores, ``d ** -0.5`` by default.
        dropout: probability in [0, 1).

    All floating, of one dtype (fp32, fp16 or bf16; others fall back) and one device. Returns
    ``(batch, tokens, heads * d)``.

    Raises:
        TypeError: an argument is no tensor, not floating, or of another dtype than x.
        ValueError: shapes do not fit, devices differ, dropout without a seed or not in [0, 1).
    """
    weights, biases = parameters[:3], parameters[3:]
    q, k, v = (
        _heads(F.linear(x, w, b), heads) for w, b in zip(weights, biases, strict=True)
    )  # fmt: skip
    attended = cross_attention.reference(
        q, k, v, None, None, bias, key_mask, seed, scale=scale, dropout=dropout
    )
    return attended.transpose(1, 2).reshape(*x.shape[:2], weights[0].shape[0])


def _heads(x: Tensor, heads: int) -> Tensor:
    batch, tokens, features = x.shape
    return x.view(batch, tokens, heads, features // heads).transpose(1, 2)


@self_attention.accepts
def accepts(x, parameters, bias, key_mask, seed, *, heads, scale, dropout):
    try:
        dtype, device = x.dtype, x.device
        batch, tokens, width = x.shape
        features = parameters[0].shape[0]
        if (
            len(parameters) == 6
            and features % heads == 0
            and dtype.is_floating_point
            and all(p.dtype is dtype and p.device == device for p in parameters)
            and all(p.shape == (features, width) for p in parameters[:3])
            and all(p.shape == (features,) for p in parameters[3:])
            and (bias is None or _reaches(bias, (batch, heads, tokens, tokens), device))
            and (
                key_mask is None
                or (
                    key_mask.shape == (batch, tokens)
                    and key_mask.dtype is torch.bool
                    and key_mask.device == device
                )
            )
            and 0 <= dropout < 1
            and (dropout == 0 or (seed.dtype is torch.int64 and seed.numel() == 1))
        ):
            return x, list(parameters), bias, key_mask, seed
    except (AttributeError, ValueError, TypeError, IndexError, ZeroDivisionError):
        pass
    raise _mistake(x, parameters, bias, key_mask, seed, heads, dropout)


def _reaches(bias, shape, device):
    return (
        bias.ndim == 4
        and bias.is_floating_point()
        and bias.device == device
        and all(have in (1, want) for have, want in zip(bias.shape, shape, strict=True))
    )


def _mistake(x, parameters, bias, key_mask, seed, heads, dropout):
    op = "self_attention"
    if not isinstance(parameters, (list, tuple)):
        return not_a_tensor(op, "parameters", parameters)
    names = ("weight_q", "weight_k", "weight_v", "bias_q", "bias_k", "bias_v")
    if len(parameters) != 6:
        return wrong_value(op, "parameters", len(parameters), f"six: {', '.join(names)}")
    named = dict(x=x, **{f"parameters ({n})": p for n, p in zip(names, parameters, strict=True)})
    optional = dict(bias=bias, key_mask=key_mask, seed=seed)
    for name, value in {**named, **optional}.items():
        if not isinstance(value, Tensor) and not (value is None and name in optional):
            return not_a_tensor(op, name, value)
    if x.ndim != 3:
        return wrong_value(op, "x", x, "three dimensions, (batch, tokens, width)")
    batch, tokens, width = x.shape
    first = parameters[0]
    features = first.shape[0] if first.ndim else 0
    if type(heads) is not int or heads < 1 or features % heads:
        return wrong_value(op, "heads", heads, f"a divisor of {features}, the weights' outputs")
    for i, (name, value) in enumerate(list(named.items())[1:]):
        wanted = (features, width) if i < 3 else (features,)
        if value.shape != wanted:
            return wrong_value(op, name, value, f"{wanted}")
    if not x.is_floating_point():
        return wrong_type(op, "x", x, "a floating dtype (float32, bfloat16 or float16)")
    for name, value in named.items():
        if value.dtype != x.dtype:
            return wrong_type(op, name, value, f"{x.dtype} as x has")
    if key_mask is not None and key_mask.shape != (batch, tokens):
        return wrong_value(op, "key_mask", key_mask, f"({batch}, {tokens}) or None")
    if key_mask is not None and key_mask.dtype is not torch.bool:
        return wrong_type(op, "key_mask", key_mask, "torch.bool")
    if not 0 <= dropout < 1:
        return wrong_value(op, "dropout", dropout, "a probability in [0, 1)")
    if dropout > 0 and (seed is None or seed.dtype is not torch.int64 or seed.numel() != 1):
        return wrong_value(op, "seed", seed, "one int64, as dropout needs")
    for name, value in {**named, **optional}.items():
        if value is not None and value.device != x.device:
            return wrong_value(op, name, value, f"{x.device}, where x is")
    reach = f"floating, broadcasting to ({batch}, {heads}, {tokens}, {tokens})"
    return wrong_value(op, "bias", bias, reach)


@self_attention.requires
def requires(x, parameters, bias, key_mask, seed, *, heads, scale, dropout):
    if x.dtype not in FLOATS:
        return f"{x.dtype} has no kernels here (float32, bfloat16 and float16 have)"
    d = parameters[0].shape[0] // heads
    if d > MAX_HEAD_SIZE:
        return f"heads of {d} features are more than {MAX_HEAD_SIZE}"
    return None


@self_attention.forward
def forward(needs, x, parameters, bias, key_mask, seed, *, heads, scale, dropout):
    batch, tokens, width = x.shape
    features = parameters[0].shape[0]
    qkv = linears(x.reshape(batch * tokens, width), parameters[:3], parameters[3:])
    qkv = qkv.view(batch, tokens, 3 * features)
    q, k, v = _parts(qkv, heads)
    wanted = needs.x or needs.parameters or needs.bias
    o = attention_forward(
        q, k, v, None, None, bias, key_mask, seed,
        scale=score_scale(scale, features // heads), dropout=dropout,
    )  # fmt: skip
    out = o.transpose(1, 2).reshape(batch, tokens, features)
    if not wanted:
        return out, ()
    return out, (
        x if needs.parameters else None,
        *(parameters[:3] if needs.x else (None, None, None)),
        qkv, bias, key_mask, seed if dropout > 0 else None,
    )  # fmt: skip


@self_attention.backward
def backward(needs, kept, dout, *, heads, scale, dropout):
    x, *weights, qkv, bias, key_mask, seed = kept
    batch, tokens, features = dout.shape
    q, k, v = _parts(qkv, heads)
    do, scale = _heads(dout.contiguous(), heads), score_scale(scale, features // heads)
    dx = dparameters = dbias = None
    if needs.bias:
        dbias = bias_gradient(
            do, q, k, v, None, None, bias, key_mask, seed, scale, dropout
        )  # fmt: skip
    if not (needs.x or needs.parameters):
        return None, None, dbias, None, None
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    attention_backward(
        do, q, k, v, None, None, bias, key_mask, seed, scale=scale, dropout=dropout,
        want_q=True, want_kv=True, want_kv2=False, into=_parts(dqkv, heads),
    )  # fmt: skip
    rows = dqkv.view(batch * tokens, 3 * features)
    if needs.x:
        dx = input_gradient(rows, weights)
        dx = dx.view(batch, tokens, dx.shape[1])
    if needs.parameters:
        x = x.reshape(batch * tokens, x.shape[2])
        dparameters = parameter_gradients(rows, x, [features] * 3, needs.parameters)
        if dparameters[4] is not None:  # a key's bias shifts all scores of a query alike
            dparameters[4].mul_(0)
    return dx, dparameters, dbias, None, None


def _parts(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as ``(batch, heads, tokens, d)``, without a copy."""
    batch, tokens, features = qkv.shape
    split = qkv.view(batch, tokens, 3, heads, features // (3 * heads))
    q, k, v = split.permute(2, 0, 3, 1, 4)
    return q, k, v


@self_attention.cost
def cost(x, parameters, bias, key_mask, seed, *, heads, scale, dropout):
    batch, tokens, width = x.shape
    features = parameters[0].shape[0]
    projections = 2 * batch * tokens * width * 3 * features
    attention = 4 * batch * tokens * tokens * features
    out = batch * tokens * features * x.element_size()
    moved = nbytes(x, *parameters) + out
    return Cost(
        forward_flops=projections + attention,
        forward_bytes=moved,
        backward_flops=2 * projections + attention * 5 // 2,
        backward_bytes=2 * moved + 3 * out,
    )


@self_attention.inputs(
    test=[
        dict(batch=1, tokens=1, width=1, features=1, heads=1),
        dict(batch=3, tokens=5, width=24, features=16, masked=True, heads=2),
        dict(batch=2, tokens=33, width=72, features=48, biased=True, heads=3, scale=0.3),
        dict(batch=2, tokens=9, width=24, features=32, heads=2, dropout=0.25),
    ],
    bench={
        "BLIP-2 Q-Former, 64 images": dict(batch=64, tokens=32, width=768, features=768, heads=12),
        "BLIP-2 Q-Former, 1 image": dict(batch=1, tokens=32, width=768, features=768, heads=12),
        "InstructBLIP, 16 images": dict(
            batch=16, tokens=96, width=768, features=768, masked=True, heads=12
        ),
    },
)
def inputs(batch, tokens, width, features, *, masked=False, biased=False):
    key_mask = torch.rand(batch, tokens) < 0.7 if masked else None
    if key_mask is not None and batch > 0:
        key_mask[batch // 2] = False
    weights = [torch.randn(features, width) * width**-0.5 for _ in range(3)]
    return (
        torch.randn(batch, tokens, width),
        [*weights, *(torch.randn(features) * 0.1 for _ in range(3))],
        torch.randn(1, 1, tokens, tokens) if biased else None,
        key_mask,
        torch.tensor(20260102),
    )
