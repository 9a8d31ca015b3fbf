"""Random parameters, gradients and comparison of small modules."""

import torch


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
