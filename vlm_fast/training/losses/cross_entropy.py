"""Language-modelling loss over a vocabulary in chunks, and BERT's language-model head."""

from __future__ import annotations

import importlib.util
import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_fast.ops.argument_errors import no_double_backward, not_a_tensor, wrong_type, wrong_value

LIGER = importlib.util.find_spec("liger_kernel") is not None
# Number of logits in memory at a time. Enough rows for an efficient GEMM at a vocabulary of 30,000.
LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**25}


class LanguageModelHead(nn.Module):
    """BERT's language-model head: linear, GELU, layer norm, and a decoder with a bias.

    The decoder shares its weight with the word embeddings. Parameters have the names of BERT's
    ``cls.predictions``, which LAVIS' Q-Former uses as well.

    Args:
        word_embeddings: ``nn.Embedding(vocabulary, hidden)``.
        layer_norm_eps: epsilon of the layer norm.
    """

    def __init__(self, word_embeddings: nn.Embedding, *, layer_norm_eps: float = 1e-12) -> None:
        super().__init__()
        vocabulary, hidden = word_embeddings.weight.shape
        like: dict[str, Any] = {
            "device": word_embeddings.weight.device, "dtype": word_embeddings.weight.dtype,
        }  # fmt: skip
        self.transform = nn.Sequential(
            OrderedDict(
                dense=nn.Linear(hidden, hidden, **like),
                act=nn.GELU(),
                LayerNorm=nn.LayerNorm(hidden, eps=layer_norm_eps, **like),
            )
        )
        self.decoder = nn.Linear(hidden, vocabulary, **{**like, "device": "meta"})
        self.decoder.weight = word_embeddings.weight
        self.decoder.bias = nn.Parameter(torch.zeros(vocabulary, **like))

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute logits ``(..., vocabulary)`` from hidden states ``(..., hidden)``."""
        return self.decoder(self.transform(hidden))


def itg_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Image-grounded text generation loss of BLIP-2: next-token cross entropy in chunks.

    Computes ``F.cross_entropy(F.linear(hidden[:, :-1], weight, bias), labels[:, 1:])`` (arXiv
    2301.12597, section 3.2) without a tensor of all logits. Gradients are computed in forward. On a
    GPU Liger's fused kernel is used if Liger is installed; otherwise PyTorch's GEMMs with float32
    between them. (PyTorch's own ``linear_cross_entropy`` makes all logits as soon as labels are
    smoothed.)

    Args:
        hidden: ``(batch, tokens, hidden)``, the input of the projection to the vocabulary.
        weight, bias: of that projection, ``(vocabulary, hidden)`` and ``(vocabulary,)`` or None.
        labels: ``(batch, tokens)`` int64, not shifted: the token at each position.
        label_smoothing: from 0 to 1; LAVIS' Q-Former is trained with 0.1.
        ignore_index: label of tokens that do not count, such as padding.

    Returns:
        A scalar, float32 or wider: the mean over tokens that count, NaN if there are none.
            Differentiable once. In fp16 small gradients survive if the loss is scaled, for example
            by ``torch.amp.GradScaler``; they can overflow only in backward.

    Raises:
        TypeError: an argument is not a tensor of its kind, or dtypes differ outside autocast.
        ValueError: shapes or devices do not fit, or smoothing is out of range.
        RuntimeError: in backward with ``create_graph``.
    """
    _check(hidden, weight, labels, bias, label_smoothing)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        raise wrong_type("itg_loss", "weight and bias", weight, f"{hidden.dtype} as hidden has")
    rows, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    with torch.autocast(device, enabled=False):
        if _liger_serves(rows, weight):
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            loss = liger_fused_linear_cross_entropy(
                rows, weight, targets, bias,
                ignore_index=ignore_index, label_smoothing=label_smoothing,
            )  # fmt: skip
            return _OnceDifferentiable.apply(loss)
        if device == "cpu":  # boolean indexing costs no wait here, so skip padding
            counts = targets != ignore_index
            rows, targets = rows[counts], targets[counts]
        return _LinearCrossEntropy.apply(rows, weight, bias, targets, label_smoothing, ignore_index)


def _liger_serves(rows: Tensor, weight: Tensor) -> bool:
    # Liger returns no gradient for the weight if the hidden states need none, and in fp16 it rounds
    # gradients before a loss scale reaches them.
    wanted = rows.requires_grad or not weight.requires_grad
    return LIGER and rows.is_cuda and wanted and rows.dtype != torch.float16


class _OnceDifferentiable(torch.autograd.Function):
    """Identity that refuses a second derivative: gradients computed in forward are constants."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise no_double_backward("itg_loss")
        return grad


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        smoothing: float,
        ignore_index: int,
    ) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        need_rows, need_weight, need_bias = ctx.needs_input_grad[:3]
        drows = torch.empty_like(rows) if need_rows else None
        undo_rows = rows.new_empty(len(rows), 1, dtype=wide) if need_rows else None
        dweight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        dbias = weight.new_zeros(len(weight), dtype=wide) if need_bias else None
        counted = labels != ignore_index
        count = counted.sum()
        scale = 1 / count.clamp(min=1).to(wide)
        total = rows.new_zeros((), dtype=wide)
        step = max(LOGITS_AT_ONCE["cuda" if rows.is_cuda else "cpu"] // max(len(weight), 1), 1)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            keep = counted[part, None]
            label = labels[part, None].masked_fill(~keep, 0)
            logits = F.linear(rows[part], weight, bias).to(wide)
            norm = logits.logsumexp(1, keepdim=True)
            loss = norm - (1 - smoothing) * logits.gather(1, label)
            if smoothing:
                loss -= smoothing * logits.mean(1, keepdim=True)
            total += loss.masked_fill_(~keep, 0.0).sum()
            if drows is None and dweight is None and dbias is None:
                continue
            # Divide by the count later: in fp16 most of these values would become zero.
            dlogits = logits.sub_(norm).exp_()
            if smoothing:
                dlogits -= smoothing / len(weight)
            dlogits.scatter_add_(1, label, dlogits.new_full(label.shape, smoothing - 1))
            dlogits.masked_fill_(~keep, 0.0)
            if dbias is not None:
                dbias += dlogits.sum(0)
            if drows is not None and undo_rows is not None:
                fitting, undo_rows[part] = _scale_to_fit(dlogits, rows.dtype, 1, weight)
                torch.mm(fitting, weight, out=drows[part])
            if dweight is not None and wide == rows.dtype:
                dweight.addmm_(dlogits.t(), rows[part])
            elif dweight is not None:
                fitting, undo = _scale_to_fit(dlogits, rows.dtype, 0, rows[part])
                dweight.addcmul_(torch.mm(fitting.t(), rows[part]), undo)
        undo_weight = None
        if dweight is not None:
            dweight, undo_weight = _scale_to_fit(dweight.mul_(scale), weight.dtype)
        ctx.save_for_backward(
            drows, None if undo_rows is None else undo_rows.mul_(scale),
            dweight, undo_weight,
            dbias, None if dbias is None else scale.view(1),
        )  # fmt: skip
        ctx.dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # create_graph is set; `once_differentiable` would silently return constants
        if torch.is_grad_enabled():
            raise no_double_backward("itg_loss")
        found: list[Tensor | None] = []
        saved = ctx.saved_tensors
        for kept, undo in zip(saved[::2], saved[1::2], strict=True):
            out = None if kept is None else torch.empty_like(kept, dtype=ctx.dtype)
            found.append(None if out is None else torch.mul(kept, undo * grad, out=out))
        return *found, None, None, None


def _scale_to_fit(
    tensor: Tensor, dtype: torch.dtype, dim: int | None = None, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convert ``tensor`` to ``dtype`` with a scale that avoids overflow; return the inverse too.

    A user scales the loss because gradients can be too small for fp16, but that scale is unknown in
    forward. So values are multiplied by the largest power of two that keeps them in range. With
    ``dim`` also the product with ``factor``, summed over ``dim``, stays in range; then there is one
    scale per row if rows stay separate, else one for all.
    """
    factor = tensor if factor is None else factor
    if dtype != torch.float16 or 0 in (tensor.numel(), factor.numel()):
        return tensor.to(dtype), tensor.new_ones(1, 1)
    order = math.inf if dim is None else 1
    size = torch.linalg.vector_norm(tensor, order, dim, keepdim=True).amax(1, keepdim=True)
    if dim is not None:
        largest = torch.linalg.vector_norm(factor, math.inf, dtype=tensor.dtype)
        size *= largest.clamp(min=1)
    exponent = 15 - torch.frexp(size).exponent.clamp(-60, 60)
    power = torch.ldexp(torch.ones_like(size), exponent)
    return (tensor * power).to(dtype), 1 / power


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, label_smoothing: float
) -> None:
    name = "itg_loss"
    named = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias}
    if bias is None:
        del named["bias"]
    for argument, value in named.items():
        if not isinstance(value, Tensor):
            raise not_a_tensor(name, argument, value)
        if argument == "labels":
            if value.dtype != torch.int64:
                raise wrong_type(name, argument, value, "torch.int64")
        elif not value.is_floating_point():
            raise wrong_type(name, argument, value, "a floating dtype")
        if value.device != hidden.device:
            raise wrong_value(name, argument, value, f"{hidden.device}, where hidden is")
    if hidden.ndim != 3 or hidden.shape[1] < 2:
        raise wrong_value(name, "hidden", hidden, "(batch, tokens, hidden), 2 tokens at least")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[2]:
        raise wrong_value(name, "weight", weight, f"(vocabulary, {hidden.shape[2]})")
    if labels.shape != hidden.shape[:2]:
        raise wrong_value(name, "labels", labels, f"{tuple(hidden.shape[:2])}, as hidden has")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise wrong_value(name, "bias", bias, f"({weight.shape[0]},) or None")
    if not 0.0 <= label_smoothing <= 1.0:
        raise wrong_value(name, "label_smoothing", label_smoothing, "0 to 1")
