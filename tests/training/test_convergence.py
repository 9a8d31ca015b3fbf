"""Fused models train like unfused ones on a CPU, and a wrong gradient would be detected."""

import pytest
import torch

from tests.support.captioned_models import FAMILIES
from tests.support.captioned_training import (
    ALLOWED,
    fused_training_is_unfused_training,
    train,
    yardstick,
)
from tests.support.convergence import distance
from vlm_fast.ops.declaration import OPS

pytestmark = pytest.mark.slow
every_family = pytest.mark.parametrize("family", FAMILIES)


# 1 % too large on average. Adam does not see one factor for all gradients of a layer.
TILTED = "from 0 to 2 % too large"


@every_family
def test_fused_training_matches_unfused(family):
    """The runs differ less than fp32 from fp64: most CPU ops are ATen's in another order."""
    fused_training_is_unfused_training(family, torch.float32, "cpu", allowed=1)


def test_fused_training_under_autocast_matches_unfused():
    fused_training_is_unfused_training("mllama", torch.bfloat16, "cpu")


@pytest.mark.parametrize(
    "family, op, argument, factor",
    [
        ("llava", "mlp", "bias_1", 0),
        ("blip2", "qformer_layer", "hidden", TILTED),
        ("idefics", "gated_add_norm", "gate", 0),
        ("mllama", "gated_mlp", "x", 1.01),
    ],
)
def test_wrong_gradient_is_detected(family, op, argument, factor, monkeypatch):
    """One gradient of one op is zeroed, or 1 % too large; all others are right."""
    op = OPS[op]
    wrong, right = op.tensors.index(argument), op._path.backward

    def backward(*args, **options):
        gradients = list(right(*args, **options))
        one = gradients[wrong]
        tilt = torch.linspace(1, 1.02, one.shape[-1], dtype=one.dtype)
        gradients[wrong] = one * (tilt if factor is TILTED else factor)
        return tuple(gradients)

    monkeypatch.setattr(op._path, "backward", backward)
    plain, apart = yardstick(family, torch.float32, "cpu")
    broken = train(family, torch.float32, "cpu", fused=True)
    assert distance(broken, plain).ratio_to(apart) > 5 * ALLOWED
