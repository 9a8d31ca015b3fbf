"""LLaVA projectors in plain PyTorch, each with a fast one with the same parameters."""

import copy

import pytest
import torch

import vlm_fast
from tests.support.chain_structures import HIDDEN, WIDTH, mlp
from tests.support.randomised_modules import gradients, randomised
from vlm_fast.modules import SequentialProjector

X = torch.arange(2 * 5 * WIDTH).view(2, 5, WIDTH).sin()


def pair(depth=2, **options):
    """A plain projector and a patched copy."""
    plain = randomised(mlp(depth, WIDTH, HIDDEN))
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast, strict=True, **options)
    return plain, fast


def module_pair(depth=2):
    """A plain projector and a `SequentialProjector` with the same parameters."""
    plain = randomised(mlp(depth, WIDTH, HIDDEN))
    fast = SequentialProjector(WIDTH, HIDDEN, depth=depth)
    fast.load_state_dict(plain.state_dict(), strict=True)
    return plain, fast


every_pair = pytest.mark.parametrize(
    "make", [pair, module_pair], ids=["patched", "SequentialProjector"]
)


def assert_alike(fast, plain, x=X, *, fused=None):
    """Compare results and gradients; ``fused``: whether no fallback is expected."""
    vlm_fast.stats(reset=True)
    ours, theirs = gradients(fast, x), gradients(plain, x)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    counts = vlm_fast.stats(reset=True)
    fallbacks = [reason for c in counts.values() for reason in c["fallback"]]
    calls = {name: c["fast"] for name, c in counts.items() if c["fast"]}
    if fused is not None:
        assert bool(fallbacks) != fused, fallbacks
    return calls, fallbacks
