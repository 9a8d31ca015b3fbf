"""BLIP-2's first stage: contrastive, matching and generation loss (arXiv 2301.12597)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.modules.qformer.model import QFormer
from vlm_fast.modules.qformer.shared_inputs import ImageKeyValues
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.training.losses.contrastive import ContrastiveOutput, hard_negatives, itc_loss
from vlm_fast.training.losses.cross_entropy import itg_loss
from vlm_fast.training.losses.rank_exchange import (
    Sizes,
    check_same_on_ranks,
    exchange_rows,
    get_world,
)


class Stage1Output(NamedTuple):
    """The result of `stage1_loss`, four scalars.

    Attributes:
        loss: the sum of the three losses.
        itc: image-text contrastive loss.
        itm: image-text matching loss.
        itg: image-grounded text generation loss.
    """

    loss: Tensor
    itc: Tensor
    itm: Tensor
    itg: Tensor


def itm_loss(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Image-text matching loss of BLIP-2 (arXiv 2301.12597, section 3.2).

    The logits of a pair are averaged over its queries; the loss is their cross entropy.

    Args:
        logits: ``(pairs, queries, 2)``, floating: outputs of the matching head at every query.
        labels: ``(pairs,)`` int64, 1 for a matching pair and 0 for others. None means that the
            first third of the pairs match.

    Returns:
        A scalar, float32 or wider.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: shapes do not fit, or labels is None and the number of pairs is no multiple of
            3.
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
) -> Stage1Output:
    """The three losses of BLIP-2's first stage (section 3.2), sharing their common computations.

    The keys and values of an image are computed once, for the contrastive loss and for matching the
    image with its own and a wrong text. Generation attends to the queries' keys and values from the
    contrastive pass, because queries do not see text there. As in LAVIS, negatives are drawn from
    the batches of all ranks by their contrastive similarity, and the first token is replaced by a
    special one, [DEC], for generation.

    Under DistributedDataParallel, call this inside the forward of the wrapped module. The
    contrastive and the matching loss are those of the whole batch. The generation loss is a mean
    over the tokens of each rank, as usual, so tokens of a rank with fewer of them weigh more.

    Args:
        model: transformers' ``Blip2ForImageTextRetrieval``, or a module with its ``query_tokens``,
            ``embeddings``, ``qformer``, ``vision_projection``, ``text_projection``, ``itm_head``.
        image_embeds: ``(batch, patches, width)``, outputs of the vision encoder.
        input_ids, attention_mask: ``(batch, tokens)``. The first token is BERT's [CLS]; tokens with
            mask 0 are padding, at the end.
        lm_head: a module with ``decoder``, a Linear to the vocabulary, and optionally ``transform``
            before it: `LanguageModelHead`.
        bos_token_id: id of [DEC], an index into the word embeddings.
        temperature: see `itc_loss`; None takes ``model.temp``.
        label_smoothing: of the contrastive and the generation loss; the default is LAVIS'.
        local_loss, check_sizes, group: see `itc_loss`.
        generator: random generator for negatives, on the device of ``image_embeds``.
        qformer: a ``QFormer`` made from ``model.qformer``, to reuse; None makes one.

    Returns:
        The sum of the losses and each of them, scalars.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: shapes do not fit, or the batch over all ranks is a single pair, which has no
            negative; on every rank, if ranks differ in sizes or dtypes.
    """
    _check(image_embeds, input_ids, attention_mask, bos_token_id, lm_head)
    if temperature is None:
        temperature = getattr(model, "temp", None)
        if temperature is None:
            raise ValueError(
                "vlm_fast.stage1_loss: temperature is None, expected a number, a tensor or a "
                "temp of the model"
            )
    if qformer is None:
        qformer = QFormer.from_module(model.qformer)
    mask = attention_mask.to(torch.int64)

    key_values = qformer.image_key_values(image_embeds)
    queries = model.query_tokens.expand(len(image_embeds), -1, -1)
    # The keys and values of the queries are kept for generation.
    image = qformer(queries, image_key_values=key_values, keep=True)
    features = _features(model, qformer, image.last_hidden_state, input_ids, mask)
    if check_sizes:  # the dtypes of features are known only here, and nothing has been sent yet
        _check_ranks(image_embeds, input_ids, features, group)
    contrast = itc_loss(
        *features, temperature,
        label_smoothing=label_smoothing, local_loss=local_loss, check_sizes=False, group=group,
    )  # fmt: skip
    logits = _matching_logits(
        model, qformer, image_embeds, key_values, torch.stack([input_ids, mask], 1), contrast,
        generator, group,
    )  # fmt: skip
    itm = itm_loss(logits)
    decoded = input_ids.index_fill(1, input_ids.new_zeros(1), bos_token_id)
    itg = _generation_loss(model, qformer, image.past, decoded, mask, lm_head, label_smoothing)
    return Stage1Output(contrast.loss + itm + itg, contrast.loss, itm, itg)


def _features(
    model: Any, qformer: QFormer, image_hidden: Tensor, input_ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Normalised image features ``(batch, queries, d)`` and text features ``(batch, d)``."""
    text = qformer(model.embeddings(input_ids=input_ids), query_length=0, attention_mask=mask)
    return (
        F.normalize(_projected(model.vision_projection, image_hidden), dim=-1),
        F.normalize(_projected(model.text_projection, text.last_hidden_state[:, 0]), dim=-1),
    )


def _check_ranks(
    image_embeds: Tensor, input_ids: Tensor, features: tuple[Tensor, Tensor], group: Any
) -> None:
    """Raise ValueError on every rank if ranks differ in sizes or dtypes."""
    batch, patches, _ = image_embeds.shape
    sizes: Sizes = {
        "batch": batch, "image patches": patches, "text tokens": input_ids.shape[1],
        "dtype of image_embeds": image_embeds.dtype,
        "dtype of image features": features[0].dtype,
        "dtype of text features": features[1].dtype,
    }  # fmt: skip
    check_same_on_ranks("stage1_loss", sizes, image_embeds.device, group)


def _matching_logits(
    model: Any,
    qformer: QFormer,
    image_embeds: Tensor,
    key_values: ImageKeyValues,
    texts: Tensor,
    contrast: ContrastiveOutput,
    generator: torch.Generator | None,
    group: Any,
) -> Tensor:
    """Logits ``(3 * batch, queries, 2)``: matching pairs, wrong texts, then wrong images.

    ``texts`` is ``(batch, 2, tokens)``: ids and mask.
    """
    world, batch = get_world(group), len(texts)
    offset = world.rank * batch
    wrong_texts = hard_negatives(contrast.similarity_i2t, offset, generator)
    wrong_images = hard_negatives(contrast.similarity_t2i, offset, generator)
    # Both texts of an image are neighbours, so that they share its keys and values.
    pairs = torch.stack([texts, exchange_rows(texts, wrong_texts, group)], 1)
    own_image = _match(model, qformer, pairs.flatten(0, 1), None, key_values)
    if world.size == 1:
        other_image = _match(model, qformer, texts, None, key_values.select(wrong_images))
    else:
        other_embeds = exchange_rows(image_embeds, wrong_images, group)
        other_image = _match(model, qformer, texts, other_embeds, None)
    own_image = own_image.unflatten(0, (batch, 2)).transpose(0, 1).flatten(0, 1)
    return torch.cat([own_image, other_image])


def _generation_loss(
    model: Any,
    qformer: QFormer,
    past: Any,
    input_ids: Tensor,
    mask: Tensor,
    lm_head: Any,
    label_smoothing: float,
) -> Tensor:
    """Loss of text whose tokens attend to the queries (``past``) and to the text before them."""
    hidden = qformer(
        model.embeddings(input_ids=input_ids),
        query_length=0, attention_mask=mask, past=past, causal=True,
    ).last_hidden_state  # fmt: skip
    transform = getattr(lm_head, "transform", None)
    return itg_loss(
        hidden if transform is None else transform(hidden),
        lm_head.decoder.weight,
        input_ids.masked_fill(mask == 0, -100),
        lm_head.decoder.bias,
        label_smoothing=label_smoothing,
    )


def _projected(projection: Any, hidden: Tensor) -> Tensor:
    # Checkpoints keep the Q-Former in fp32, but not always the projections.
    return projection(hidden.to(projection.weight.dtype))


def _match(
    model: Any,
    qformer: QFormer,
    texts: Tensor,
    image_embeds: Tensor | None,
    key_values: ImageKeyValues | None,
) -> Tensor:
    """Matching logits ``(pairs, queries, 2)``; ``texts`` is ``(pairs, 2, tokens)``: ids, mask."""
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
