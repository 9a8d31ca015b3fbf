"""BLIP-2's first stage: one pass each for contrast, matching and generation (arXiv 2301.12597)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.modules.qformer.model import QFormer
from vlm_fast.modules.qformer.shared_inputs import ImageKeyValues
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.training.losses.contrastive import hard_negatives, itc_loss
from vlm_fast.training.losses.cross_entropy import itg_loss
from vlm_fast.training.losses.rank_exchange import exchange_rows, refuse_uneven, world_of


class Stage1(NamedTuple):
    """The sum of the three losses of stage 1, and each of them."""

    loss: Tensor
    itc: Tensor
    itm: Tensor
    itg: Tensor


def itm_loss(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Image-text matching: the cross entropy of each pair's logits, averaged over its queries.

    Args:
        logits: ``(pairs, queries, 2)``, floating: of the matching head, at every query.
        labels: ``(pairs,)`` int64, 1 where image and text belong together. None stands for a
            third of own pairs, then two thirds of wrong ones.

    Returns:
        A scalar, in float32 at least.

    Raises:
        TypeError: an argument is not a tensor, or of another kind.
        ValueError: shapes do not fit, or the pairs are not three equal thirds.
    """
    if not isinstance(logits, Tensor):
        raise not_a_tensor("itm_loss", "logits", logits)
    if logits.ndim != 3 or logits.shape[2] != 2 or 0 in logits.shape:
        raise wrong_value("itm_loss", "logits", logits, "(pairs, queries, 2), one at least")
    if not logits.is_floating_point():
        raise wrong_type("itm_loss", "logits", logits, "a floating dtype")
    pairs = logits.shape[0]
    if labels is None:
        if pairs % 3:
            wanted = "a multiple of 3 pairs, or labels"
            raise wrong_value("itm_loss", "logits", logits, wanted)
        labels = torch.zeros(pairs, dtype=torch.int64, device=logits.device)
        labels[: pairs // 3] = 1
    elif not isinstance(labels, Tensor):
        raise not_a_tensor("itm_loss", "labels", labels)
    elif labels.shape != (pairs,) or labels.dtype != torch.int64:
        raise wrong_value("itm_loss", "labels", labels, f"({pairs},) torch.int64")
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.mean(1, dtype=wide), labels)


def stage1_loss(
    model: Any,
    image_embeds: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    lm_head: Any,
    bos_token_id: int,
    temperature: float | Tensor | None = None,
    label_smoothing: float = 0.1,
    local_loss: bool = True,
    check_sizes: bool = True,
    generator: torch.Generator | None = None,
    group: Any = None,
    qformer: QFormer | None = None,
) -> Stage1:
    """Contrast, matching and generation of BLIP-2 (section 3.2), with the work they share once.

    The image's keys and values are projected once, for contrast and for matching with the own and
    the wrong text; the queries' pass of the contrast is also what generation looks back at, since
    there queries see no text. Wrong images come with their own keys and values. As LAVIS does it,
    wrong partners are drawn from the batches of all ranks by their contrastive similarity, and
    generation starts with a token of its own, [DEC], in the place of the first.

    Under DistributedDataParallel call this within the forward of the module that is wrapped.
    Contrast and matching are then those of the whole batch; generation is a mean over the tokens
    of each rank, which count for more where there are fewer of them, as everywhere.

    Args:
        model: transformers' ``Blip2ForImageTextRetrieval``, or a module with its ``query_tokens``,
            ``embeddings``, ``qformer``, ``vision_projection``, ``text_projection``, ``itm_head``.
        image_embeds: ``(batch, patches, width)`` of the vision encoder, frozen or not.
        input_ids, attention_mask: ``(batch, tokens)``, the first token being BERT's [CLS];
            tokens whose mask is 0 are padding, at the end.
        lm_head: a module with ``decoder``, a Linear to the vocabulary, and perhaps ``transform``
            before it: `LanguageModelHead`.
        bos_token_id: of [DEC], within the word embeddings.
        temperature: see `itc_loss`; None is ``model.temp``.
        label_smoothing: of contrast and generation; LAVIS' value.
        local_loss, check_sizes, group: see `itc_loss`.
        generator: for drawing wrong partners, of the device of ``image_embeds``.
        qformer: a ``QFormer`` over ``model.qformer``, kept by the caller; None makes one.

    Returns:
        The sum, and contrast, matching and generation, all scalars.

    Raises:
        TypeError, ValueError: arguments do not fit, a batch of one pair in all, which has no wrong
            partner; sizes or dtypes that differ between ranks, on every rank.
    """
    _check(image_embeds, input_ids, attention_mask, bos_token_id, lm_head)
    if temperature is None:
        temperature = getattr(model, "temp", None)
        if temperature is None:
            raise ValueError(
                "vlm_fast.stage1_loss: temperature is None, expected a number, a tensor or a "
                "temp of the model"
            )
    batch, patches, _ = image_embeds.shape
    world = world_of(group)
    if qformer is None:
        qformer = QFormer.from_module(model.qformer)
    mask = attention_mask.to(torch.int64)
    queries = model.query_tokens.expand(batch, -1, -1)

    # Contrast: each stream alone. The queries' keys and values are kept for generation.
    key_values = qformer.image_key_values(image_embeds)
    image = qformer(queries, image_key_values=key_values, keep=True)
    text = qformer(model.embeddings(input_ids=input_ids), query_length=0, attention_mask=mask)
    features = (
        F.normalize(_projected(model.vision_projection, image.last_hidden_state), dim=-1),
        F.normalize(_projected(model.text_projection, text.last_hidden_state[:, 0]), dim=-1),
    )
    if check_sizes:  # here, where the dtype of features is known, and nothing has been sent
        refuse_uneven(
            "stage1_loss",
            {
                "batch": batch, "image patches": patches, "text tokens": input_ids.shape[1],
                "dtype of image_embeds": image_embeds.dtype,
                "dtype of image features": features[0].dtype,
                "dtype of text features": features[1].dtype,
            },
            image_embeds.device, group,
        )  # fmt: skip
    contrast = itc_loss(
        *features, temperature,
        label_smoothing=label_smoothing, local_loss=local_loss, check_sizes=False, group=group,
    )  # fmt: skip

    # Matching: every image with its own and a wrong text, and a wrong image with every text.
    offset = world.rank * batch
    wrong_texts = hard_negatives(contrast.similarity_i2t, offset, generator)
    wrong_images = hard_negatives(contrast.similarity_t2i, offset, generator)
    texts = torch.stack([input_ids, mask], 1)
    pairs = torch.stack([texts, exchange_rows(texts, wrong_texts, group)], 1)  # by image
    own_image = _match(model, qformer, pairs.flatten(0, 1), None, key_values)
    if world.size == 1:
        other_image = _match(model, qformer, texts, None, key_values.select(wrong_images))
    else:
        other_embeds = exchange_rows(image_embeds, wrong_images, group)
        other_image = _match(model, qformer, texts, other_embeds, None)
    own_image = own_image.unflatten(0, (batch, 2)).transpose(0, 1).flatten(0, 1)
    itm = itm_loss(torch.cat([own_image, other_image]))

    # Generation: text looks back at the queries, and at the text before it.
    decoded = input_ids.index_fill(1, input_ids.new_zeros(1), bos_token_id)
    generation = qformer(
        model.embeddings(input_ids=decoded),
        query_length=0, attention_mask=mask, past=image.past, causal=True,
    ).last_hidden_state  # fmt: skip
    transform = getattr(lm_head, "transform", None)
    itg = itg_loss(
        generation if transform is None else transform(generation),
        lm_head.decoder.weight,
        decoded.masked_fill(mask == 0, -100),
        lm_head.decoder.bias,
        label_smoothing=label_smoothing,
    )
    return Stage1(contrast.loss + itm + itg, contrast.loss, itm, itg)


def _projected(projection: Any, hidden: Tensor) -> Tensor:
    # The Q-Former is kept in fp32 by checkpoints whose projections are not.
    return projection(hidden.to(projection.weight.dtype))


def _match(
    model: Any,
    qformer: QFormer,
    texts: Tensor,
    image_embeds: Tensor | None,
    key_values: ImageKeyValues | None,
) -> Tensor:
    """Matching logits at every query; ``texts`` are ``(pairs, 2, tokens)``: ids and mask."""
    ids, mask = texts.unbind(1)
    count = model.query_tokens.shape[1]
    queries = model.query_tokens.expand(len(ids), -1, -1)
    hidden = qformer(
        model.embeddings(input_ids=ids, query_embeds=queries),
        query_length=count,
        attention_mask=torch.cat([mask.new_ones(len(mask), count), mask], 1),
        encoder_hidden_states=image_embeds,
        image_key_values=key_values,
    ).last_hidden_state[:, :count]
    return _projected(model.itm_head, hidden)


def _check(
    image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor, bos: int, lm_head: Any
) -> None:
    name = "stage1_loss"
    named = {"image_embeds": image_embeds, "input_ids": input_ids, "attention_mask": attention_mask}
    for argument, value in named.items():
        if not isinstance(value, Tensor):
            raise not_a_tensor(name, argument, value)
    if image_embeds.ndim != 3:
        raise wrong_value(name, "image_embeds", image_embeds, "(batch, patches, width)")
    if input_ids.ndim != 2 or len(input_ids) != len(image_embeds) or input_ids.shape[1] < 2:
        wanted = f"({len(image_embeds)}, tokens), a text of 2 tokens at least for each image"
        raise wrong_value(name, "input_ids", input_ids, wanted)
    if input_ids.dtype != torch.int64:
        raise wrong_type(name, "input_ids", input_ids, "torch.int64")
    if attention_mask.shape != input_ids.shape:
        wanted = f"{tuple(input_ids.shape)}, as input_ids has"
        raise wrong_value(name, "attention_mask", attention_mask, wanted)
    vocabulary = lm_head.decoder.weight.shape[0]
    if not 0 <= bos < vocabulary:
        raise wrong_value(name, "bos_token_id", bos, f"0 to {vocabulary - 1}, of the vocabulary")
