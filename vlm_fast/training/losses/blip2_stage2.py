"""BLIP-2's second stage: query outputs as a soft prompt for a frozen language model."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value

M = TypeVar("M", bound=nn.Module)


def freeze(module: M) -> M:
    """Set ``requires_grad`` of all parameters to False and switch to eval mode.

    Gradients still flow through the module to its inputs, which stage 2 needs; ``torch.no_grad``
    would cut them off. ``train()`` on a parent module switches dropout on again.

    Returns:
        The module itself.
    """
    return module.requires_grad_(False).eval()


def soft_prompt(qformer_output: Tensor, projection: Any) -> Tensor:
    """Project query outputs to the width of the language model (arXiv 2301.12597, section 3.3).

    Args:
        qformer_output: ``(batch, queries, hidden)``. It is converted to the dtype of the
            projection, because checkpoints keep the Q-Former in fp32.
        projection: a linear layer.

    Returns:
        ``(batch, queries, width of the language model)``.
    """
    return projection(qformer_output.to(projection.weight.dtype))


def stage2_loss(
    model: Any,
    images: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    """Language-modelling loss of text after a soft prompt (arXiv 2301.12597, section 3.3).

    The input of the language model is the projected query outputs followed by the embedded text.
    The loss covers the text only; the last query predicts its first token. If the language model
    has ``logits_to_keep``, logits are computed for the text only.

    Args:
        model: transformers' ``Blip2ForConditionalGeneration`` with a decoder, or a module with
            ``query_tokens``, ``qformer``, ``language_projection`` and ``language_model``, and for
            pixels ``vision_model``. The language model should be frozen, see `freeze`.
        images: outputs of the vision encoder ``(batch, patches, width)``, or pixels ``(batch,
            channels, height, width)``. A vision encoder without trainable parameters runs without a
            graph.
        input_ids, attention_mask: ``(batch, tokens)`` of the text, padded at the end.
        labels: ``(batch, tokens)`` int64, not shifted, -100 for tokens that do not count, such as
            those of a question. None counts every token that is not padding.

    Returns:
        A scalar, float32 or wider: the mean over tokens that count.

    Raises:
        TypeError: an argument is not a tensor, or labels are not int64.
        ValueError: shapes do not fit, or the language model has an encoder.
    """
    labels = _check(model, images, input_ids, attention_mask, labels)
    if images.ndim == 4:
        vision = model.vision_model
        wanted = any(p.requires_grad for p in vision.parameters())
        with torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
            images = vision(pixel_values=images).last_hidden_state
    queries = model.query_tokens.expand(len(images), -1, -1)
    hidden = model.qformer(query_embeds=queries, encoder_hidden_states=images).last_hidden_state
    language_model = model.language_model
    text = language_model.get_input_embeddings()(input_ids)
    prompt = soft_prompt(hidden, model.language_projection).to(text.dtype)
    kept = input_ids.shape[1] + 1  # the last query predicts the first token
    takes_it = "logits_to_keep" in inspect.signature(language_model.forward).parameters
    logits = language_model(
        inputs_embeds=torch.cat([prompt, text], 1),
        attention_mask=torch.cat(
            [attention_mask.new_ones(prompt.shape[:2]), attention_mask], 1
        ),
        use_cache=False,
        **({"logits_to_keep": kept} if takes_it else {}),
    ).logits  # fmt: skip
    logits = logits[:, -kept:-1].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _check(
    model: Any, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None
) -> Tensor:
    name = "stage2_loss"
    named = {"images": images, "input_ids": input_ids, "attention_mask": attention_mask}
    if labels is not None:
        named["labels"] = labels
    for argument, value in named.items():
        if not isinstance(value, Tensor):
            raise not_a_tensor(name, argument, value)
    if images.ndim not in (3, 4):
        raise wrong_value(name, "images", images, "(batch, patches, width) or pixels")
    if input_ids.ndim != 2 or len(input_ids) != len(images) or input_ids.shape[1] == 0:
        wanted = f"({len(images)}, tokens), a text for each image"
        raise wrong_value(name, "input_ids", input_ids, wanted)
    if attention_mask.shape != input_ids.shape:
        wanted = f"{tuple(input_ids.shape)}, as input_ids has"
        raise wrong_value(name, "attention_mask", attention_mask, wanted)
    if getattr(getattr(model.language_model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "vlm_fast.stage2_loss: language_model has an encoder, expected a decoder alone"
        )
    if labels is None:
        return input_ids.masked_fill(attention_mask == 0, -100)
    if labels.dtype != torch.int64:
        raise wrong_type(name, "labels", labels, "torch.int64")
    if labels.shape != input_ids.shape:
        raise wrong_value(name, "labels", labels, f"{tuple(input_ids.shape)}, as input_ids has")
    return labels
