"""A projector trained for a few AdamW steps with interpreted kernels, fused and unfused."""

import copy

import pytest
import torch

import vlm_fast
from tests.support.convergence import adamw, distance
from vlm_fast.modules import MLPProjector

pytestmark = pytest.mark.devices("interpreter")

STEPS = 5


def test_projector_training_matches_unfused():
    projector = MLPProjector(12, 20)
    features, wanted = torch.randn(2, 7, 12), torch.randn(2, 7, 20)

    def run(dtype):
        trained = copy.deepcopy(projector).to(dtype)
        x, y = features.to(dtype), wanted.to(dtype)
        losses = ((trained(x) - y).square().mean() for _ in range(STEPS))
        return adamw(trained.parameters(), losses, lr=1e-2)

    with vlm_fast.strict():
        fused = run(torch.float32)
    assert vlm_fast.stats()["mlp"]["fast"] == STEPS
    with vlm_fast.disabled():
        plain, exact = run(torch.float32), run(torch.float64)
    assert distance(fused, plain).ratio_to(distance(plain, exact)) < 4
    assert fused.loss_ratio() < 1
