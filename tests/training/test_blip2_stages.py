"""BLIP-2's two training stages in one process, against a plain reference from transformers."""

import pytest
import torch
from torch import nn

from tests.support import reference_losses
from tests.support.tiny_blip2 import generative, parts
from vlm_fast.modules.qformer.model import QFormer
from vlm_fast.training import losses
from vlm_fast.training.losses import blip2_stage1


def gradients_of(loss, model, head):
    parameters = dict(model.named_parameters()) | {
        f"head.{name}": p for name, p in head.named_parameters()
    }
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


@pytest.fixture
def drawn_negatives(monkeypatch):
    """The hard negatives of each call: texts, then images."""
    drawn = []
    original = blip2_stage1.hard_negatives
    monkeypatch.setattr(
        blip2_stage1, "hard_negatives", lambda *a: drawn.append(original(*a)) or drawn[-1]
    )
    return drawn


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("of", [None, QFormer.from_module], ids=["transformers", "from_module"])
def test_stage1_matches_reference(drawn_negatives, of, smoothing):
    model, head, image_embeds, ids, mask = parts(5)
    image_embeds.requires_grad_()
    found = losses.stage1_loss(
        model, image_embeds, ids, mask, lm_head=head, bos_token_id=60,
        label_smoothing=smoothing, qformer=of and of(model.qformer),
    )  # fmt: skip
    expected = reference_losses.stage1(
        model, image_embeds, ids, mask, head, 60, model.temp, smoothing, drawn_negatives
    )
    for name, ours, plain in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(ours, plain, msg=lambda m, name=name: f"{name}: {m}")
    (ours,) = torch.autograd.grad(found.loss, image_embeds, retain_graph=True)
    torch.testing.assert_close(
        ours, torch.autograd.grad(expected[0], image_embeds, retain_graph=True)[0],
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    gradients, wanted = (gradients_of(x[0], model, head) for x in (found, expected))
    unused = {name for name, gradient in wanted.items() if gradient is None}
    assert not any("qformer" in name or "head" in name for name in unused)
    for name, gradient in gradients.items():
        assert (gradient is None) == (name in unused), name
        if gradient is not None:
            torch.testing.assert_close(
                gradient, wanted[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_stage1_accepts_temperature_and_generator():
    model, head, *batch = parts(4)
    del model.temp
    call = lambda **options: losses.stage1_loss(  # noqa: E731
        model, *batch, lm_head=head, bos_token_id=60, **options
    )
    first, again = (
        call(temperature=0.1, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first.loss, again.loss)
    assert not torch.equal(first.itc, call(temperature=0.5).itc)
    with pytest.raises(ValueError, match=r"stage1_loss: temperature is None, expected"):
        call()


@pytest.mark.parametrize(
    "position, value, words",
    [
        (0, torch.zeros(4, 12), "image_embeds (4, 12)"),
        (1, torch.zeros(3, 6, dtype=torch.int64), "input_ids (3, 6)"),
        (1, torch.zeros(4, 6), "input_ids float32"),
        (2, torch.zeros(4, 5), "attention_mask (4, 5)"),
        (2, None, "attention_mask NoneType"),
    ],
)
def test_stage1_invalid_arguments_raise(position, value, words):
    model, head, *batch = parts(4)
    batch[position] = value
    with pytest.raises((TypeError, ValueError), match=r"^vlm_fast.stage1_loss: .*expected") as e:
        losses.stage1_loss(model, *batch, lm_head=head, bos_token_id=60)
    assert all(word in str(e.value) for word in words.split())


def test_stage1_refuses_out_of_vocabulary_token_and_single_pair():
    model, head, *batch = parts(4)
    with pytest.raises(ValueError, match="bos_token_id is 64, expected 0 to 63"):
        losses.stage1_loss(model, *batch, lm_head=head, bos_token_id=64)
    with pytest.raises(ValueError, match=r"similarity .*2 columns at least"):
        losses.stage1_loss(
            model, *(t[:1] for t in batch), lm_head=head, bos_token_id=60,
        )  # fmt: skip


def prompted(batch=3, tokens=6):
    ids = torch.randint(4, 70, (batch, tokens))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return ids, mask


@pytest.mark.parametrize("what", ["features", "pixels"])
@pytest.mark.parametrize("own_labels", [True, False])
def test_stage2_matches_reference(what, own_labels):
    model = generative()
    assert losses.freeze(model.language_model) is model.language_model
    losses.freeze(model.vision_model)
    images = torch.randn(3, 5, 12) if what == "features" else torch.randn(3, 3, 8, 8)
    ids, mask = prompted()
    labels = ids.masked_fill(mask == 0, -100)
    if own_labels:
        labels[:, :2] = -100  # a question, which has no labels
    loss = losses.stage2_loss(model, images, ids, mask, labels if own_labels else None)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    features = model.vision_model(images).last_hidden_state if what == "pixels" else images
    queries = model.qformer(model.query_tokens.expand(3, -1, -1), encoder_hidden_states=features)
    prompt = model.language_projection(queries.last_hidden_state)
    count = prompt.shape[1]
    embeds = torch.cat([prompt, model.language_model.get_input_embeddings()(ids)], 1)
    expected = model.language_model(
        inputs_embeds=embeds,
        attention_mask=torch.cat([mask.new_ones(3, count), mask], 1),
        labels=torch.cat([labels.new_full((3, count), -100), labels], 1),
    ).loss
    torch.testing.assert_close(loss, expected)
    expected.backward()
    trained = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert gradients[name] is None, name
            assert name.startswith(("language_model", "vision_model"))
            continue
        trained += 1
        assert gradients[name].abs().max() > 0 or name.endswith("key.bias"), name
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
    assert (
        trained == len([*model.qformer.parameters(), *model.language_projection.parameters()]) + 1
    )


def test_freezing_switches_dropout_off():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    losses.freeze(module)
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    x = torch.randn(3, 2, requires_grad=True)
    assert torch.autograd.grad(module(x).sum(), x)[0].abs().sum() > 0


def test_soft_prompt_has_projection_dtype():
    projection = nn.Linear(4, 6, dtype=torch.bfloat16)
    prompt = losses.soft_prompt(torch.randn(2, 3, 4), projection)
    assert prompt.shape == (2, 3, 6) and prompt.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(images=torch.zeros(3, 12)), "images (3, 12)"),
        (dict(input_ids=torch.zeros(2, 6, dtype=torch.int64)), "input_ids (2, 6)"),
        (dict(attention_mask=torch.zeros(3, 5)), "attention_mask (3, 5)"),
        (dict(labels=torch.zeros(3, 6)), "labels int64"),
        (dict(labels=torch.zeros(3, 5, dtype=torch.int64)), "labels (3, 5)"),
        (dict(labels="x"), "labels str"),
    ],
)
def test_stage2_invalid_arguments_raise(change, words):
    ids, mask = prompted()
    arguments = dict(images=torch.zeros(3, 5, 12), input_ids=ids, attention_mask=mask) | change
    with pytest.raises((TypeError, ValueError), match=r"^vlm_fast.stage2_loss: .*expected") as e:
        losses.stage2_loss(generative(), **arguments)
    assert all(word in str(e.value) for word in words.split())


def test_stage2_refuses_encoder_decoder_language_model():
    model = generative()
    model.language_model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="language_model has an encoder"):
        losses.stage2_loss(model, torch.zeros(3, 5, 12), *prompted())
