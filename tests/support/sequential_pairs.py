"""Projectors of LLaVA in plain PyTorch, each with a fast one of the same parameters."""

import copy

import pytest
import torch

import vlm_fast
from tests.support.chain_structures import HIDDEN, WIDTH, mlp
from tests.support.randomised_modules import gradients, randomised
from vlm_fast.modules import SequentialProjector

X = torch.arange(2 * 5 * WIDTH).view(2, 5, WIDTH).sin()


def pair(depth=2, **options):
    """A plain one and a patched one of the same parameters."""
    plain = randomised(mlp(depth, WIDTH, HIDDEN))
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast, strict=True, **options)
    return plain, fast


def module_pair(depth=2):
    """The same with `SequentialProjector` in place of a patched one."""
    plain = randomised(mlp(depth, WIDTH, HIDDEN))
    fast = SequentialProjector(WIDTH, HIDDEN, depth=depth)
    fast.load_state_dict(plain.state_dict(), strict=True)
    return plain, fast


every_pair = pytest.mark.parametrize(
    "make", [pair, module_pair], ids=["patched", "SequentialProjector"]
)


def assert_alike(fast, plain, x=X, *, fused=None):
    """Results and gradients; ``fused``: whether it runs without a fallback."""
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
