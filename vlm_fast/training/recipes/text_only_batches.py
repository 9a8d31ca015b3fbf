"""Batches without an image: the connector's parameters get gradients all the same, of zero.

Where one rank has images and another has none, DistributedDataParallel waits for gradients that
never come, and FSDP2 for a gather that only one side asks for; with everything else frozen such a
batch has nothing to differentiate at all. Here it goes the same way as one with images: the
projector is touched, a sharded tower runs on a blank one, and a zero that depends on the connector
is added to the embedded text, where features would have been put.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.modules.parameter_access.sharded_parameters import is_sharded
from vlm_fast.patching.sharding import touch_parameters
from vlm_fast.training.recipes.model_parts import Parts, parts_of

IMAGES = ("pixel_values", "pixel_values_videos", "image_encoder_embeddings", "perceiver_embeddings",
          "cross_attention_states")  # fmt: skip


def touch(model: nn.Module, parts: Parts | None = None) -> Tensor:
    """A zero scalar that depends on every parameter of the connector that learns.

    A projector by `touch_parameters`, after the tower if that is sharded by FSDP2. What is not so
    reached (gated layers within the language model, a newline between tiles) is read directly:
    under FSDP2 such a parameter has to be in a unit that every rank runs.

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
    if any(is_sharded(module) for module in parts.tower.modules()):
        parts.tower(_blank(parts.tower))
    projector = getattr(parts.inner, "multi_modal_projector", None)
    if isinstance(projector, nn.Module) and any(id(p) in learning for p in projector.parameters()):
        own = [id(parameter) for parameter in projector.parameters()]  # sharded, they are others
        zero = zero + touch_parameters(projector)
        for number in own:
            learning.pop(number, None)
    return zero + sum(parameter.flatten()[:0].sum() for parameter in learning.values())


def touch_without_images(model: nn.Module) -> None:
    """Have batches without an image `touch` the connector.

    What is added to the embedded text is zero; a batch with images, evaluation and generation are
    left alone.
    """
    inner = parts_of(model).inner
    if _touching not in inner._forward_pre_hooks.values():
        inner.register_forward_pre_hook(_touching, with_kwargs=True)


def _touching(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # LLaVA's second argument is its pixels; models of transformers pass them by name.
    given = len(args) > 1 or any(kwargs.get(name) is not None for name in IMAGES)
    if given or not (inner.training and torch.is_grad_enabled()):
        return None
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = inner.get_input_embeddings()(args[0] if args else kwargs["input_ids"])
    embeds = embeds + touch(inner).to(embeds.dtype)
    return (), kwargs | {"input_ids": None, "inputs_embeds": embeds}


def _blank(tower: Any) -> Tensor:
    config, weight = tower.config, next(tower.parameters())
    shape = (1, config.num_channels, config.image_size, config.image_size)  # not all run on 0
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device)
