"""What the suites loop over: every declared op at every one of its test shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlm_fast import ops as ops
from vlm_fast.kernels._absorbed_cross_attention_aten import after_dropout
from vlm_fast.op import OPS, Op

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def shape_id(shape: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return "-".join(f"{name}{text(value)}" for name, value in shape.items())


every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
every_case = pytest.mark.parametrize(
    "op, shape",
    [
        pytest.param(op, shape, id=f"{op.name}-{shape_id(shape)}")
        for op in OPS.values()
        for shape in op.test_shapes
    ],
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def usual_shape(op: Op[..., Any]) -> dict[str, Any]:
    """A test shape beyond the degenerate first: odd, and larger than one of anything."""
    return op.test_shapes[1]


def enlarged(shape: dict[str, Any], factor: int) -> dict[str, Any]:
    """The shape with ``factor`` times the rows or images; with 0, none of them."""
    new = dict(shape)
    for name in {"batch", "count"} & shape.keys():
        new[name] = factor * shape[name]
    if "shape" in shape:
        new["shape"] = (factor * shape["shape"][0], *shape["shape"][1:])
    assert factor == 1 or new != shape, f"which of {list(shape)} is the number of images or rows?"
    return new


def plain_absorbed(
    q, x, weight_k, bias_k, weight_v, bias_v, key_mask, seed, *, heads, scale=None, dropout=0.0
):
    """Absorbed attention in plain PyTorch: what rounds at ``|q W| |x|`` and not at ``|q| |k|``."""
    batch, queries, features = q.shape
    d = features // heads
    split = q.view(batch, queries, heads, d).transpose(1, 2)
    wide = split @ weight_k.view(heads, d, -1) * (d**-0.5 if scale is None else scale)
    scores = wide @ x[:, None].transpose(2, 3)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    p = torch.ops.aten._safe_softmax(scores, -1)
    if dropout > 0:
        p = after_dropout(p.flatten(1, 2), seed, heads, dropout).view(p.shape)
    out = (p @ x[:, None]) @ weight_v.view(heads, d, -1).transpose(1, 2)
    if bias_v is not None:
        out = out + p.sum(-1, keepdim=True) * bias_v.view(heads, 1, d)
    if bias_k is not None:
        out = out + 0 * bias_k.sum()
    return out.transpose(1, 2).reshape(q.shape)


# Where scores of thousands saturate the softmax, the order of the products shows in the result; the
# yardstick is then plain PyTorch in the op's own order. The reference in float64 stays the truth.
SAME_ORDER = {"absorbed_cross_attention": plain_absorbed}
