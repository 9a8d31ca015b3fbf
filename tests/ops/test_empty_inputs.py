"""Inputs with one dimension of size 0 match the reference, forward and backward."""

import itertools

import pytest
import torch

from tests.support.cases import OPS, any_op, each
from vlm_fast.verification import tolerance


class Zero(int):
    """A size of 0 whose negative powers are 1, so that samples can scale weights by them."""

    def __pow__(self, exponent, modulo=None):
        return 1.0 if exponent < 0 else 0


def shapes_with_a_zero(shape):
    """The test shape with each of its sizes set to 0 in turn."""
    for name, value in shape.items():
        if type(value) is int:
            yield {**shape, name: Zero()}
        elif isinstance(value, tuple):
            for i, size in enumerate(value):
                if type(size) is int:
                    yield {**shape, name: (*value[:i], Zero(), *value[i + 1 :])}


def result_or_error(call, args, options):
    args = tolerance.convert(args, lambda t: t.detach().requires_grad_())
    results = each(call(*args, **options))
    connected = [r for r in results if r.requires_grad]
    if not connected:
        return results
    inputs = tolerance.differentiable(args)
    found = torch.autograd.grad(
        connected, inputs, list(map(tolerance.random_upstream, connected)), allow_unused=True
    )
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]
    return results + zeros


@pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")
@any_op
def test_zero_sizes_match_reference(op):
    compared = 0
    for shape in itertools.chain.from_iterable(map(shapes_with_a_zero, op.test_shapes)):
        try:
            args, options = op.sample(shape)
            expected = result_or_error(op.reference, args, options)
        except (ValueError, RuntimeError, IndexError, ZeroDivisionError):
            continue  # the input cannot be built, or plain PyTorch refuses it
        try:
            found = result_or_error(op, args, options)
        except (TypeError, ValueError) as refusal:
            assert f"vlm_fast.{op.name}:" in str(refusal)
            continue
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=str(shape))
        compared += 1
    assert compared


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (3, 2, 0), (0, 0, 4)])
@pytest.mark.parametrize("bias", [None, "full", "one"])
def test_cross_attention_without_queries_or_keys(sizes, bias):
    keys, keys2, queries = sizes

    def random_tensor(tokens):
        return torch.randn(2, 2, tokens, 5)

    given = [
        random_tensor(queries),
        random_tensor(keys),
        random_tensor(keys),
        random_tensor(keys2),
        random_tensor(keys2),
    ]
    if bias is not None:
        shape = (2, 2, queries, keys + keys2) if bias == "full" else (1, 1, 1, 1)
        given.append(torch.randn(shape))
    op = OPS["cross_attention"]
    found, expected = (result_or_error(f, given, {}) for f in (op, op.reference))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
