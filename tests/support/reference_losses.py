"""Plain references of BLIP-2's and SigLIP's losses: all logits in memory, one process."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.support.cases import assert_right


def itc(images, texts, temperature, smoothing=0.0):
    """The ITC loss and the image-to-text logits, whose transpose is text-to-image."""
    logits = torch.einsum("aqp,cp->acq", images, texts).amax(2) / temperature
    target = torch.arange(len(logits))
    losses = [F.cross_entropy(x, target, label_smoothing=smoothing) for x in (logits, logits.t())]
    return sum(losses) / 2, logits


def itg(hidden, weight, labels, bias=None, smoothing=0.0, ignore_index=-100):
    logits = F.linear(hidden[:, :-1], weight, bias).flatten(0, 1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(
        logits.to(wide), labels[:, 1:].flatten(),
        label_smoothing=smoothing, ignore_index=ignore_index,
    )  # fmt: skip


def multimodal_causal_mask(mask, queries):
    """(batch, 1, all, all): queries attend to queries, text to queries and earlier text."""
    batch, tokens = mask.shape
    seen = torch.zeros(batch, queries + tokens, queries + tokens, dtype=torch.bool)
    seen[:, :, :queries] = True
    seen[:, queries:, queries:] = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    seen[:, queries:, queries:] &= mask.bool()[:, None]
    return seen[:, None]


def stage1(model, image_embeds, ids, mask, head, bos, temperature, smoothing, negatives):
    """The three stage-1 losses with transformers' Q-Former, each in a separate pass.

    ``negatives``: the text for each image, and the image for each text.
    """
    batch, queries = len(ids), model.query_tokens.shape[1]
    tokens = model.query_tokens.expand(batch, -1, -1)
    run = lambda *args, **options: model.qformer(*args, **options).last_hidden_state  # noqa: E731
    image = run(tokens, encoder_hidden_states=image_embeds)
    text = run(model.embeddings(input_ids=ids), query_length=0, attention_mask=mask)
    contrast, _ = itc(
        F.normalize(model.vision_projection(image), dim=-1),
        F.normalize(model.text_projection(text[:, 0]), dim=-1),
        temperature, smoothing,
    )  # fmt: skip

    wrong_text, wrong_image = negatives
    pair_ids = torch.cat([ids, ids[wrong_text], ids])
    pair_mask = torch.cat([mask, mask[wrong_text], mask])
    pair_images = torch.cat([image_embeds, image_embeds, image_embeds[wrong_image]])
    pairs = run(
        model.embeddings(input_ids=pair_ids, query_embeds=tokens.repeat(3, 1, 1)),
        query_length=queries,
        attention_mask=torch.cat([mask.new_ones(3 * batch, queries), pair_mask], 1),
        encoder_hidden_states=pair_images,
    )
    logits = model.itm_head(pairs[:, :queries]).mean(1)
    matching = F.cross_entropy(logits, torch.tensor([1] * batch + [0] * 2 * batch))

    decoded = ids.clone()
    decoded[:, 0] = bos
    both = run(
        model.embeddings(input_ids=decoded, query_embeds=tokens),
        query_length=queries,
        attention_mask=multimodal_causal_mask(mask, queries),
        encoder_hidden_states=image_embeds,
    )
    hidden = head.transform(both[:, queries:])
    labels = decoded.masked_fill(mask == 0, -100)
    generation = itg(hidden, head.decoder.weight, labels, head.decoder.bias, smoothing)
    return contrast + matching + generation, contrast, matching, generation


def siglip_per_image(images, texts, scale, bias):
    """The loss of each image ``(batch,)``; the SigLIP loss is its mean."""
    logits = images @ texts.t() * scale + bias
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum(1)


def assert_matches_reference(ours, plain, tensors, dtype):
    """Check value and gradients of a loss against the plain one, in this dtype and float64."""

    def run(function, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in tensors]
        loss = function(*inputs)
        gradients = torch.autograd.grad(loss, inputs)
        return {"loss": loss.detach()} | {f"gradient {i}": g for i, g in enumerate(gradients)}

    assert_right(run(ours, dtype), lambda: run(plain, dtype), run(plain, torch.float64), "loss")
