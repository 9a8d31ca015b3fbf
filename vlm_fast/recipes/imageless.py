"""Batches without an image: the connector's parameters get gradients all the same, of zero.

Where one rank has images and another has none, DistributedDataParallel waits for gradients that
never come, and so does a sharded connector for its gather; with everything else frozen such a
batch has nothing to differentiate at all. Here the connector runs on no images at all, so that its
hooks fire, its graph is whole and its gradients are exactly zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.recipes.parts import Parts, parts_of

IMAGES = ("pixel_values", "pixel_values_videos", "image_encoder_embeddings", "perceiver_embeddings",
          "cross_attention_states")  # fmt: skip


def touch(model: nn.Module, parts: Parts | None = None) -> Tensor:
    """A zero scalar that depends on every parameter of the connector that learns.

    A projector is called on features of no images. What is not so reached (gated layers within the
    language model, a newline between tiles) is read directly: under FSDP2 such a parameter has to
    be in a unit that every rank runs.

    Args:
        model: a transformers model of one of `parts.FAMILIES`.
    """
    parts = parts or parts_of(model)
    learning = {
        id(parameter): parameter
        for _, parameter, part in parts.of_parameters(model)
        if part == "connector" and parameter.requires_grad
    }
    zero = torch.zeros((), device=next(model.parameters()).device)
    projector = getattr(parts.inner, "multi_modal_projector", None)
    if isinstance(projector, nn.Module) and any(id(p) in learning for p in projector.parameters()):
        zero = zero + projector(_no_features(projector)).sum()
        for parameter in projector.parameters():
            learning.pop(id(parameter), None)
    return zero + sum(parameter.flatten()[:0].sum() for parameter in learning.values())


def touch_without_images(model: nn.Module) -> None:
    """Have batches without an image `touch` the connector.

    What is added to the hidden states is zero; a batch with images, evaluation and generation are
    left alone.
    """
    inner = parts_of(model).inner
    if _touched not in inner._forward_hooks.values():
        inner.register_forward_hook(_touched, with_kwargs=True)


def _touched(inner: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    # LLaVA's second argument is its pixels; models of transformers pass them by name.
    given = len(args) > 1 or any(kwargs.get(name) is not None for name in IMAGES)
    if given or not (inner.training and torch.is_grad_enabled()):
        return output
    hidden = output[0]
    zero = touch(inner).to(hidden.dtype)
    if isinstance(output, tuple):
        return (hidden + zero, *output[1:])
    output["last_hidden_state"] = hidden + zero
    return output


def _no_features(projector: nn.Module) -> Tensor:
    """``(0, 1, width)``: of the width that the first layer with a weight takes."""
    for module in projector.modules():
        width = getattr(module, "in_features", None)
        if width is None and isinstance(getattr(module, "normalized_shape", None), tuple):
            width = module.normalized_shape[-1]  # type: ignore[index]
        if width is not None:
            weight: Any = next(module.parameters())
            return torch.zeros(0, 1, width, dtype=weight.dtype, device=weight.device)
    raise TypeError(
        f"vlm_fast.recipes: {type(projector).__name__} has no linear or layer norm, expected a "
        "projector of features (..., width)"
    )
