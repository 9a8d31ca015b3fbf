"""`qformer_layer`: each gradient by itself, and what text tokens exclude."""

import pytest
import torch

from vlm_fast.ops import qformer_layer

SHAPES = {
    "queries": dict(batch=4, tokens=5, features=24, inner=40, keys=7, per_image=2, heads=3),
    "shared queries": dict(batch=1, tokens=5, features=24, inner=40, shared_by=3, keys=7, heads=2),
    "both": dict(batch=2, tokens=9, text=4, features=24, inner=40, keys=7, biased=True, heads=3),
    "text": dict(batch=2, tokens=5, text=5, features=24, inner=40, masked=True, heads=2),
}


def gradients(args, options, wanted):
    """The gradients of these tensors, by number among all tensors of the call."""
    args = [list(map(torch.clone, a)) if isinstance(a, list) else a for a in args]
    floats = [a for a in (args[0], args[1], *args[2], args[3]) if a is not None]
    leaves = [floats[i].detach().requires_grad_(i in wanted) for i in range(len(floats))]
    rest = iter(leaves)
    hidden, image = next(rest), None if args[1] is None else next(rest)
    parameters = [next(rest) for _ in args[2]]
    bias = None if args[3] is None else next(rest)
    y = qformer_layer(hidden, image, parameters, bias, *args[4:], **options)
    upstream = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return torch.autograd.grad(y, [leaves[i] for i in wanted], upstream)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_gradient_by_itself(shape):
    """Frozen parameters cost no product, and what they save is not read by another block."""
    args, options = qformer_layer.sample(shape)
    count = sum(a is not None for a in (args[0], args[1], *args[2], args[3]))
    together = gradients(args, options, range(count))
    for i in range(count):
        (found,) = gradients(args, options, [i])
        torch.testing.assert_close(found, together[i], rtol=1e-5, atol=1e-6)


def test_an_image_needs_queries_and_one_sequence():
    args, options = qformer_layer.sample(SHAPES["text"])
    with pytest.raises(ValueError, match=r"image_kv .* expected None, without query tokens"):
        qformer_layer(args[0], torch.randn(2, 7, 48), *args[2:], **options)
    args, options = qformer_layer.sample(SHAPES["both"])
    with pytest.raises(ValueError, match="expected one image for one sequence with text"):
        qformer_layer(args[0][:1], torch.randn(3, 7, 48), *args[2:], **options)


def test_text_is_among_the_tokens():
    args, options = qformer_layer.sample(SHAPES["both"])
    with pytest.raises(ValueError, match="text is 10, expected a number of tokens, at most 9"):
        qformer_layer(*args, **{**options, "text": 10})
