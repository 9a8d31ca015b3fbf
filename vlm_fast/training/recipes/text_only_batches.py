"""Give the connector gradients of zero in batches without an image.

If some ranks have images and others do not, DistributedDataParallel waits for gradients that never
arrive, and FSDP2 for an all-gather that only some ranks start. If everything else is frozen, such a
batch has nothing to differentiate. Therefore a batch without an image takes the same path as
others: the projector is touched, a sharded vision encoder runs on a blank image, and a zero that
depends on the connector is added to the embedded text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.modules.parameter_access.sharded_parameters import is_sharded
from vlm_fast.patching.sharding import touch_parameters
from vlm_fast.training.recipes.model_parts import ModelParts, find_parts

IMAGES = ("pixel_values", "pixel_values_videos", "image_encoder_embeddings", "perceiver_embeddings",
          "cross_attention_states")  # fmt: skip


def touch_connector(model: nn.Module, parts: ModelParts | None = None) -> Tensor:
    """A zero that depends on every trainable parameter of the connector.

    A projector is used through `touch_parameters`, after the vision encoder if FSDP2 shards that.
    Other parameters, such as gated layers inside the language model or a newline between tiles, are
    read directly; under FSDP2 they have to be in a unit that every rank runs.

    Args:
        model: a transformers model of one of `model_parts.FAMILIES`.
        parts: of the model; None finds them.

    Returns:
        A scalar.
    """
    parts = parts or find_parts(model)
    learning = {
        id(parameter): parameter
        for _, parameter, part in parts.label_parameters(model)
        if part == "connector" and parameter.requires_grad
    }
    zero = torch.zeros((), device=next(model.parameters()).device)
    if any(is_sharded(module) for module in parts.tower.modules()):
        parts.tower(_blank(parts.tower))
    projector = getattr(parts.inner, "multi_modal_projector", None)
    if isinstance(projector, nn.Module) and any(id(p) in learning for p in projector.parameters()):
        # FSDP replaces them while the projector runs
        own = [id(parameter) for parameter in projector.parameters()]
        zero = zero + touch_parameters(projector)
        for number in own:
            learning.pop(number, None)
    return zero + sum(parameter.flatten()[:0].sum() for parameter in learning.values())


def touch_connector_without_images(model: nn.Module) -> None:
    """Make batches without an image call `touch_connector` in training.

    The zero is added to the embedded text. Batches with images, evaluation and generation are not
    changed.
    """
    inner = find_parts(model).inner
    if _touching not in inner._forward_pre_hooks.values():
        inner.register_forward_pre_hook(_touching, with_kwargs=True)


def _touching(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # The second positional argument of LLaVA is its pixels; transformers passes pixels by name.
    """Forward pre-hook that adds the zero."""
    given = len(args) > 1 or any(kwargs.get(name) is not None for name in IMAGES)
    if given or not (inner.training and torch.is_grad_enabled()):
        return None
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = inner.get_input_embeddings()(args[0] if args else kwargs["input_ids"])
    embeds = embeds + touch_connector(inner).to(embeds.dtype)
    return (), kwargs | {"input_ids": None, "inputs_embeds": embeds}


def _blank(tower: Any) -> Tensor:
    """One image of zeros for a vision encoder."""
    config, weight = tower.config, next(tower.parameters())
    # some encoders do not accept an empty batch
    shape = (1, config.num_channels, config.image_size, config.image_size)
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device)
