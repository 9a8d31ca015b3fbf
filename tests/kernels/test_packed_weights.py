"""Several linears run as one: their parameters and gradients do not share memory."""

import io

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.support.cases import OPS

STACKED_LINEAR, SELF_ATTENTION = OPS["stacked_linear"], OPS["self_attention"]


def three_linears(outs=(5, 3, 4), width=7):
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(width, out) for out in outs)


def parameters_of(linears):
    return [linear.weight for linear in linears] + [linear.bias for linear in linears]


def stacked_linear(linears, x):
    return STACKED_LINEAR.fast(x, parameters_of(linears))


def self_attention(linears, x):
    return SELF_ATTENTION.fast(x[None], parameters_of(linears), heads=2)


def own_bytes(tensor):
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


CALLS = [(stacked_linear, (5, 3, 4)), (self_attention, (4, 4, 4))]


@pytest.mark.parametrize("call, outs", CALLS)
@pytest.mark.parametrize("mode", ["eager", "registered"])
def test_gradients_do_not_share_memory(call, outs, mode):
    linears = three_linears(outs)
    if mode == "eager":
        call(linears, torch.randn(6, 7)).square().sum().backward()
    else:
        with FlopCounterMode(display=False):  # any dispatch mode takes the registered op
            call(linears, torch.randn(6, 7)).square().sum().backward()
    gradients = [p.grad for p in linears.parameters()]
    assert all(map(own_bytes, gradients))
    assert len({g.untyped_storage().data_ptr() for g in gradients}) == len(gradients)


def test_saved_gradient_of_one_key_excludes_the_others():
    linears = three_linears((16,) * 12, 24)
    for linear in linears:
        linear.requires_grad_(False)
    linears[3].weight.requires_grad_()
    stacked_linear(linears, torch.randn(6, 24)).sum().backward()
    file = io.BytesIO()
    torch.save(linears[3].weight.grad, file)
    assert file.tell() < 3 * linears[3].weight.numel() * 4
    assert all(p.grad is None for linear in linears[:3] for p in linear.parameters())


@pytest.mark.parametrize("call, outs", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_need_not_be_contiguous(call, outs, dtype):
    linears = three_linears(outs).to(dtype)
    x = torch.randn(7, 12, dtype=dtype).t()[::2]
    for parameters in (linears.parameters(), [linears[1].weight]):
        found = torch.autograd.grad(call(linears, x).sum(), list(parameters), retain_graph=True)
        again = torch.autograd.grad(
            call(linears, x.contiguous()).sum(), [linears[1].weight], retain_graph=True
        )
        assert any(torch.equal(g, again[0]) for g in found)
    assert torch.equal(call(linears, x), call(linears, x.contiguous()))


@pytest.mark.parametrize("call, outs", CALLS)
def test_only_wanted_gradients_are_computed(call, outs):
    """One trained key beside frozen linears costs one matrix product for its gradient."""
    linears = three_linears(outs)
    for linear in linears:
        linear.requires_grad_(False)
    linears[1].weight.requires_grad_()
    y = call(linears, torch.randn(6, 7))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert products == 2 * 6 * 7 * outs[1]
