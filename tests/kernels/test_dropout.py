"""Ops with dropout: forward and backward use the same mask, which depends on the seed."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.cases import OPS
from tests.support.op_accuracy import assert_accurate
from vlm_fast.kernels._dropout import keep_mask
from vlm_fast.verification import tolerance

pytestmark = pytest.mark.devices("cpu", "interpreter", "cuda")

DROPPING = {name: op for name, op in OPS.items() if "dropout" in op.defaults}
every_dropping_op = pytest.mark.parametrize("op", DROPPING.values(), ids=DROPPING.keys())


def sample(op, seed, device, p=0.25):
    args, options = op.sample(op.usual_shape, device=device)
    at = seeds_of(op)
    seed = torch.full_like(args[at], seed)
    return (*args[:at], seed, *args[at + 1 :]), {**options, "dropout": p}


def seeds_of(op):
    """The position of the argument with the seed, or with a seed for each dropout of the op."""
    return next(i for i, name in enumerate(op.tensors) if name.startswith("seed"))


@pytest.mark.parametrize("seed", [-1, 2**40 + 5])
@every_dropping_op
def test_parity_for_extreme_seeds(device, op, seed):
    assert_accurate(op, *sample(op, seed, device))


@every_dropping_op
def test_results_depend_on_the_seed(device, op):
    def results(seed):
        torch.manual_seed(1)
        args, options = sample(op, seed, device)
        return tolerance.outputs_and_gradients(op.fast, args, options)

    ((first,), gradients), ((again,), same) = results(7), results(7)
    assert torch.equal(first, again) and all(map(torch.equal, gradients, same))
    for other in (8, 7 + 2**32):
        assert not torch.equal(first, results(other)[0][0])


@every_dropping_op
def test_seed_is_not_read_without_dropout(device, op):
    args, options = sample(op, 7, device, p=0.0)
    other, _ = sample(op, 8, device, p=0.0)
    at = seeds_of(op)
    results = [
        op.fast(*args[:at], seed, *args[at + 1 :], **options) for seed in (args[at], other[at])
    ]
    assert torch.equal(*results)


def layer_norm_showing_its_mask(device, p, rows=64, features=257):
    """Return x and a function of it whose result is positive exactly where x is kept."""
    zeros, ones = (torch.full((features,), n, device=device) for n in (0.0, 1.0))
    residual = torch.zeros(rows, features, device=device)

    def run(x, seed):
        seed = torch.tensor(seed, device=device)
        op = OPS["add_layer_norm"]
        return op.fast(x, residual, ones, zeros, None, seed, eps=1e-5, dropout=p)

    return torch.ones(rows, features, device=device), run


def test_gradient_is_zero_exactly_where_dropped(device):
    x, run = layer_norm_showing_its_mask(device, 0.3)
    y = run(x.requires_grad_(), 5)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert torch.equal(dx != 0, y > 0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_kept_elements_have_probability_1_minus_p_and_are_independent(device, p):
    x, run = layer_norm_showing_its_mask(device, p)
    kept, other = run(x, 5) > 0, run(x, 6) > 0
    stays, agree = 1 - p, p**2 + (1 - p) ** 2
    pairs = {
        "survival": (kept, stays),
        "another seed": (kept == other, agree),
        "the row before": (kept[1:] == kept[:-1], agree),
        "the column before": (kept[:, 1:] == kept[:, :-1], agree),
    }
    for name, (found, chance) in pairs.items():
        sigma = math.sqrt(chance * (1 - chance) / found.numel())
        assert abs(found.double().mean().item() - chance) < 5 * sigma, name


def test_generator_is_philox(device):
    """Compare with Random123's known answer: the first word at counter 0 under key 0."""
    word, zero = 0x6627E8D5, torch.zeros((), dtype=torch.int64, device=device)
    for p, keep in ((word / 2**32, True), ((word + 1) / 2**32, False)):
        assert bool(keep_mask(zero, p, zero, zero, zero)) is keep
    x, run = layer_norm_showing_its_mask(device, (word + 1) / 2**32)
    mask = run(x, 0) > 0
    row, col = (torch.arange(n, device=device) for n in mask.shape)
    expected = keep_mask(zero, (word + 1) / 2**32, col, row[:, None], zero)
    assert torch.equal(mask, expected) and not mask[0, 0]
