"""Random parameters, gradients and comparison of small modules."""

import copy

import torch
from torch.utils._pytree import tree_map_only

from tests.support.cases import assert_right
from vlm_fast.verification import tolerance


def randomised(module):
    """Add noise to all parameters; initial zeros and ones would hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def gradients(module, *args):
    x, *others = args
    x = x.detach().requires_grad_()
    y = module(x, *others)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], upstream)]


def assert_close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def results(module, *inputs):
    """The output, the first of a tuple, and gradients of floating inputs and of parameters."""
    leaves = {}

    def leaf(tensor):
        if not tensor.is_floating_point():
            return tensor
        return leaves.setdefault(f"input {len(leaves)}", tensor.detach().requires_grad_())

    y = module(*tree_map_only(torch.Tensor, leaf, inputs))
    y = y[0] if isinstance(y, tuple) else y
    leaves |= dict(module.named_parameters())
    found = torch.autograd.grad(y, list(leaves.values()), tolerance.random_upstream(y))
    return {"output": y.detach()} | dict(zip(leaves, found, strict=True))


def in_double(module, *inputs):
    """Copies of a module and of its inputs in float64."""
    wide = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    return copy.deepcopy(module).double(), *wide


def assert_as_accurate(fast, plain, *inputs):
    """Check output and gradients by the tolerance rule, against the plain module in float64."""
    exact = results(*in_double(plain, *inputs))
    assert_right(results(fast, *inputs), lambda: results(plain, *inputs), exact, "output")
