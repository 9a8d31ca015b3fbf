"""Compares fused with unfused training: a hundred AdamW steps on captioned photographs.

The yardstick is the distance between two unfused runs in this dtype and in the next wider one.
For fp32 that is fp64, hundreds of times as strict as bf16. If one gradient of an activation is 1 %
too large, runs end 6 to 160 yardsticks from the unfused one (measured), and still nearer to it
than its bf16 run. A wrong factor on the gradient of a parameter cannot be detected, because AdamW
divides it out.

At lr 1e-3 small differences grow chaotically: bf16 runs were 0.4 to 2.8 yardsticks apart.
"""

import contextlib
import copy
from functools import cache

import torch

import vlm_fast
from tests.support.captioned_models import FAMILIES
from tests.support.convergence import adamw, distance

STEPS, BATCH = 100, 4
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
# A gradient may have three times the error of plain PyTorch's, which has one itself.
ALLOWED = 4
LOSS_RATIO = 0.8

prepared = cache(lambda family: FAMILIES[family]())


def train(family, dtype, device, *, fused):
    """Train all but the vision tower, in parameters of fp32 or fp64; bf16 is autocast."""
    model, inputs = copy.deepcopy(prepared(family))
    autocast = dtype is torch.bfloat16
    kept = torch.float32 if autocast else dtype
    model = model.train().to(device, kept)
    inputs = {
        name: value.to(device, kept if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name and "vision_model" not in name)

    def losses():
        for rows in _batches(len(inputs["input_ids"])):
            batch = {name: value[rows] for name, value in inputs.items()}
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                yield model(**batch, use_cache=False).loss

    with _fusing(model) if fused else contextlib.nullcontext():
        return adamw((p for p in model.parameters() if p.requires_grad), losses(), lr=3e-4)


@cache
def unfused(family, dtype, device):
    return train(family, dtype, device, fused=False)


def yardstick(family, dtype, device):
    """The unfused run, and its distance from the run in the next wider dtype."""
    plain = unfused(family, dtype, device)
    return plain, distance(plain, unfused(family, WIDER[dtype], device))


def fused_training_is_unfused_training(family, dtype, device, allowed=ALLOWED):
    plain, apart = yardstick(family, dtype, device)
    fused = train(family, dtype, device, fused=True)
    found = distance(fused, plain)
    assert found.ratio_to(apart) <= allowed, f"fused and unfused: {found}, in two dtypes: {apart}"
    assert max(fused.loss_ratio(), plain.loss_ratio()) < LOSS_RATIO


@contextlib.contextmanager
def _fusing(model):
    """Check that the model is patched and every connector uses fast ops at every step."""
    report = vlm_fast.patch(model)
    vlm_fast.stats(reset=True)
    with vlm_fast.strict():
        yield
    assert vlm_fast.explain(model) == dict.fromkeys(report.patched)
    calls = sum(count["fast"] for count in vlm_fast.stats().values())
    # A patched Q-Former model prepares the inputs of its encoder and calls no op itself.
    calling = [words for words in report.patched.values() if not words.endswith("Model")]
    assert calls >= STEPS * len(calling), vlm_fast.stats()


def _batches(count):
    """The batches of every run: each photograph once per epoch, in a fixed shuffled order."""
    generator = torch.Generator().manual_seed(0)
    rounds = -(-STEPS * BATCH // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    return order[: STEPS * BATCH].split(BATCH)
