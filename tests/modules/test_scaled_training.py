"""fp16 training of a Q-Former with `GradScaler`: as accurate as unpatched."""

import pytest
import torch
from torch import nn

import vlm_fast
from tests.support import reference_losses
from tests.support.tiny_blip2 import parts
from tests.support.tiny_qformers import SMALL, blip2, images, instructblip, ones_but
from vlm_fast.training import losses
from vlm_fast.training.losses import blip2_stage1 as stage1

SCALES = [2.0**power for power in range(20, -1, -1)]
BATCH = 6


def stage_1(fast, dtype):
    """The model and a stage-1 loss with fixed hard negatives."""
    model, head, image_embeds, ids, mask = parts(BATCH)
    every = torch.arange(BATCH)
    if dtype == torch.float64:
        model, head, image_embeds = model.double(), head.double(), image_embeds.double()
        head.decoder.weight = model.embeddings.word_embeddings.weight

    def loss():
        if fast:
            return losses.stage1_loss(
                model, image_embeds, ids, mask, lm_head=head, bos_token_id=60
            ).loss
        negatives = ((every + 1) % BATCH, (every - 1) % BATCH)
        return reference_losses.stage1(
            model, image_embeds, ids, mask, head, 60, model.temp, 0.1, negatives
        )[0]

    return nn.ModuleList([model, head]), loss


def patched_qformer(kind, compute_dtype):
    def make(fast, dtype):
        sizes = dict(SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = (blip2 if kind == "blip2" else instructblip)(**sizes).train()
        given = {"encoder_hidden_states": images(3, 7, 40), "query_embeds": images(3, 4, 48)}
        if kind == "instructblip":
            given["input_ids"] = torch.randint(1, 90, (3, 5))
            mask = ones_but(3, 5, (1, 2), (2, 5))  # a text that is only padding
            given["attention_mask"] = torch.cat([torch.ones(3, 4, dtype=torch.long), mask], 1)
        target = torch.randn(3, 4, 48)
        model, target = model.to(dtype), target.to(dtype)
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
        if fast:
            vlm_fast.patch(model, compute_dtype=compute_dtype)

        def loss():
            hidden = model(**given).last_hidden_state[:, :4]
            return nn.functional.mse_loss(hidden.to(target.dtype), target)

        return model, loss

    return make


CASES = {
    "stage 1": (stage_1, True),
    "BLIP-2": (patched_qformer("blip2", None), True),
    "InstructBLIP": (patched_qformer("instructblip", None), True),
    "BLIP-2 computing in fp16": (patched_qformer("blip2", torch.float16), False),
    "InstructBLIP computing in fp16": (patched_qformer("instructblip", torch.float16), False),
}


@pytest.fixture
def fixed_negatives(monkeypatch):
    step = [1]

    def next_ones(similarity, offset, generator=None):
        step[0] = -step[0]
        return (torch.arange(len(similarity)) - step[0]) % len(similarity)

    monkeypatch.setattr(stage1, "hard_negatives", next_ones)


def gradients(make, fast, dtype, scale, autocast):
    """Gradients of the unscaled loss in float64, or None if one is not finite."""
    torch.manual_seed(3)
    model, loss = make(fast, dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype != torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.autocast("cpu", torch.float16, enabled=autocast and dtype != torch.float64):
        value = loss()
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    if all(g.isfinite().all() for g in found.values()):
        return found
    return None


def error(found, exact):
    """The relative error over all gradients together, so that zero gradients have no weight."""
    squares = [(found[name] - exact[name]).square().sum() for name in exact]
    return torch.stack(squares).sum().sqrt()


def largest_finite_scale(make, fast, autocast):
    """The largest loss scale without overflow, and the gradients at that scale."""
    runs = ((scale, gradients(make, fast, torch.float32, scale, autocast)) for scale in SCALES)
    return next((scale, found) for scale, found in runs if found is not None)


@pytest.mark.parametrize("name", CASES)
def test_gradients_under_grad_scaler_are_as_exact_as_unpatched(name, fixed_negatives):
    make, autocast = CASES[name]
    exact = gradients(make, False, torch.float64, 1.0, False)
    largest, native = largest_finite_scale(make, False, True)
    scale, found = largest_finite_scale(make, True, autocast)
    assert found.keys() == exact.keys()
    assert scale >= largest / 2 and error(found, exact) <= 2 * error(native, exact)


@pytest.mark.parametrize("name", ["stage 1", "BLIP-2", "InstructBLIP"])
def test_training_with_grad_scaler(name, fixed_negatives):
    make, _ = CASES[name]
    with vlm_fast.strict():
        model, loss = make(True, torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses, scales = [], []
        for _ in range(25):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                value = loss()
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(value.item())
            scales.append(scaler.get_scale())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert losses[-1] < 0.95 * losses[0] and min(scales) >= 2.0**8, (losses, scales)
