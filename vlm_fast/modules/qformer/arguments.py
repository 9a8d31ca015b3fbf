"""Check the arguments of a Q-Former's forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlm_fast.modules.qformer.shared_inputs import (
    OP,
    ImageKeyValues,
    ImageReaders,
    image_readers,
)
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_value


def check_arguments(
    qformer: Any, query: Tensor, query_length: int | None, mask: Tensor | None,
    image: Tensor | None, image_mask: Tensor | None, projected: ImageKeyValues | None, past: Any,
) -> tuple[int, int]:  # fmt: skip
    """The number of queries and the number of images.

    Raises:
        TypeError, ValueError: as `QFormer.forward`, which explains the arguments.
    """
    width = qformer.layernorm.weight.shape[0]
    if not isinstance(query, Tensor):
        raise not_a_tensor(OP, "query_embeds", query)
    if query.ndim != 3 or query.shape[2] != width:
        raise wrong_value(OP, "query_embeds", query, f"(batch, tokens, {width})")
    batch, tokens = query.shape[:2]
    n = tokens if query_length is None else query_length
    if not 0 <= n <= tokens:
        raise wrong_value(OP, "query_length", n, f"0 to {tokens}, the tokens of query_embeds")
    readers = image_readers(qformer.encoder.layer)
    images = check_image(readers, n, batch, image, image_mask, projected)
    if mask is not None and mask.shape[-1] != tokens:
        raise wrong_value(OP, "attention_mask", mask, f"({batch}, {tokens})")
    if past is not None and len(past) != len(qformer.encoder.layer):
        raise wrong_value(OP, "past", len(past), f"{len(qformer.encoder.layer)}, one per layer")
    first = qformer.encoder.layer[0]
    if n < tokens and not hasattr(first, "intermediate"):
        raise wrong_value(OP, "query_length", n, f"{tokens}: it was made without text input")
    return n, images


def check_image(
    readers: ImageReaders, queries: int, batch: int, image: Tensor | None,
    image_mask: Tensor | None, projected: ImageKeyValues | None,
) -> int:  # fmt: skip
    """The number of images; 0 if no layer has a cross-attention.

    Raises:
        TypeError, ValueError: the image does not fit the cross-attention layers or the batch.
    """
    count = readers.crossing
    if count == 0 or queries == 0:
        return 0
    if image is None and projected is None:
        raise ValueError(
            f"vlm_fast.{OP}: encoder_hidden_states is None, expected image features for "
            f"{count} cross-attention layers"
        )
    if projected is not None:
        if len(projected.layers) != count:
            got, wanted = len(projected.layers), f"{count}, one per cross-attention layer"
            raise wrong_value(OP, "image_key_values.layers", got, wanted)
        image = projected.layers[0]
    else:
        if not isinstance(image, Tensor):
            raise not_a_tensor(OP, "encoder_hidden_states", image)
        width = image.shape[-1] if readers.width is None else readers.width
        if image.ndim != 3 or image.shape[2] != width:
            raise wrong_value(OP, "encoder_hidden_states", image, f"(images, keys, {width})")
    images, keys = image.shape[:2]
    if (images == 0 or (batch % images and batch != 1)) and (batch or images):
        wanted = f"as many images as sequences ({batch}), or a divisor of that"
        raise wrong_value(OP, "encoder_hidden_states", image, wanted)
    if image_mask is not None and image_mask.shape != (images, keys):
        raise wrong_value(OP, "encoder_attention_mask", image_mask, f"({images}, {keys})")
    return images
