"""BLIP-2's second stage: query outputs as a soft prompt before a frozen language model."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value

M = TypeVar("M", bound=nn.Module)


def freeze(module: M) -> M:
    """Ask for no gradients of any parameter, and switch dropout off; returns the module.

    Gradients still pass through it, as stage 2 needs them to: under ``torch.no_grad`` the Q-Former
    in front would learn nothing. ``train()`` on a parent switches dropout on again.
    """
    return module.requires_grad_(False).eval()


def soft_prompt(qformer_output: Tensor, projection: Any) -> Tensor:
    """``(batch, queries, hidden)`` to ``(batch, queries, width of the language model)``.

    BLIP-2, section 3.3: a linear projection, here in its own dtype, since checkpoints keep the
    Q-Former in fp32.
    """
    return projection(qformer_output.to(projection.weight.dtype))


def stage2_loss(
    model: Any,
    images: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    """Language modelling of text behind a soft prompt (arXiv 2301.12597, section 3.3).

    The query outputs, projected, come first, then the embedded text; the loss is that of the text
    alone, its first token being predicted from the last query. Logits are made for the text alone
    where the language model can (``logits_to_keep``).

    Args:
        model: transformers' ``Blip2ForConditionalGeneration`` with a decoder, or a module with its
            ``query_tokens``, ``qformer``, ``language_projection`` and ``language_model``; see
            `freeze` for the latter. ``vision_model`` for pixels.
        images: ``(batch, patches, width)`` of the vision encoder, or ``(batch, channels, height,
            width)`` pixels. An encoder none of whose parameters want gradients runs without a
            graph.
        input_ids, attention_mask: ``(batch, tokens)`` of the text, padded at the end.
        labels: ``(batch, tokens)`` int64, not shifted, -100 where a token does not count, as in a
            question; None is every token that is not padding.

    Returns:
        A scalar, in float32 at least: the mean over tokens that count.

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
    model: Any,
    images: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor | None,
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
