"""A linear changes after the first call of a connector: the next call computes with the change.

Each change is made to a connector that has been called, and to an unpatched one or one that has
never run; both must give the same result.
"""

import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import vlm_fast
from tests.support.connectors_of_every_kind import (
    CONNECTORS,
    assert_alike,
    call,
    called,
    fallbacks,
)
from tests.support.linear_wrappers import LINEAR_WRAPPERS, on_child
from tests.support.selection import slow_except
from vlm_fast.modules import MLPProjector

pytestmark = pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")
LINEARS = {name: connector.linear for name, connector in CONNECTORS.items() if connector.linear}
every_connector = pytest.mark.parametrize("name", LINEARS)


def replace_weight(linear):
    linear.weight = nn.Parameter(1.5 * linear.weight.detach())


def swap_data(linear):
    linear.weight.data = 1.5 * linear.weight.data


def swap_tensors(linear):
    torch.utils.swap_tensors(linear.weight, nn.Parameter(1.5 * linear.weight.detach()))


def write_in_place(linear):
    with torch.no_grad():
        linear.weight.mul_(1.5)


def replace_parameters(linear):
    linear._parameters = {
        name: None if p is None else nn.Parameter(1.5 * p.detach())
        for name, p in linear._parameters.items()
    }


def replace_module(parent, name):
    torch.manual_seed(5)
    old = getattr(parent, name)
    linear = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
    parent._modules[name] = linear


# The connector stays fused after these.
SILENT = {
    "weight replaced": on_child(replace_weight),
    "data swapped": on_child(swap_data),
    "tensors swapped": on_child(swap_tensors),
    "written in place": on_child(write_in_place),
    "parameters replaced": on_child(replace_parameters),
    "module replaced": replace_module,
}


def parametrise(linear):
    class Scaled(nn.Module):
        def forward(self, weight):
            return 1.5 * weight

    parametrize.register_parametrization(linear, "weight", Scaled())


def change_class(linear):
    class Adapted(nn.Linear):
        def forward(self, x):
            return 1.5 * super().forward(x)

    linear.__class__ = Adapted


def set_forward(linear):
    linear.forward = types.MethodType(lambda self, x: 1.5 * nn.Linear.forward(self, x), linear)


def replace_hooks(linear):
    linear._forward_hooks = {0: lambda module, args, y: 1.5 * y}


# The connector calls the linear after these, for a reason that matches the pattern.
LOUD = {
    **LINEAR_WRAPPERS,
    "parametrised": (on_child(parametrise), "is not a plain nn.Linear"),
    "class changed": (on_child(change_class), "Adapted is not a plain nn.Linear"),
    "own forward": (on_child(set_forward), "its forward has been replaced"),
    "hooks replaced": (on_child(replace_hooks), "it has hooks"),
}


def change_both(fast, plain, name, change):
    parent, _, child = LINEARS[name].rpartition(".")
    for module in (fast, plain):
        torch.manual_seed(3)
        change(module.get_submodule(parent), child)


@pytest.mark.parametrize("change", SILENT)
@every_connector
def test_changes_that_need_no_fallback(name, change):
    fast, plain, given = called(name)
    before = call(fast, given).detach()
    change_both(fast, plain, name, SILENT[change])
    with vlm_fast.strict():
        after = assert_alike(fast, plain, given)
    assert not torch.equal(before, after)


def test_frozen_linear_gets_no_gradient():
    fast, plain, given = called("MLPProjector")
    for module in (fast, plain):
        module.linear_1.requires_grad_(False)
    with vlm_fast.strict():
        assert_alike(fast, plain, given)


FEW = ["LoRA", "forward hook", "dynamic quantisation", "parametrised", "own forward", "compile()"]


@pytest.mark.parametrize("change", slow_except(FEW, LOUD))
@every_connector
def test_changes_that_need_a_fallback(name, change):
    fast, plain, given = called(name)
    change, reason = LOUD[change]
    change_both(fast, plain, name, change)
    with vlm_fast.strict(), pytest.raises(vlm_fast.VlmFastFallbackError, match=reason):
        call(fast, given)
    vlm_fast.stats(reset=True)
    try:
        call(plain, given)
    except Exception as error:  # such as a bias of another dtype: the same error
        with pytest.raises(type(error)):
            call(fast, given)
    else:
        call(fast, given)
        assert fallbacks()
        if change is not LOUD["meta weight"][0]:  # its result is uninitialised memory
            assert_alike(fast, plain, given)


@every_connector
def test_data_of_another_dtype(name):
    """The parameters of one linear become float64, which PyTorch refuses to mix with float32."""
    fast, plain, given = called(name)
    for module in (fast, plain):
        for parameter in module.get_submodule(LINEARS[name]).parameters():
            parameter.data = parameter.data.double()
        with pytest.raises(RuntimeError, match="dtype"):
            call(module, given)


def test_data_of_another_dtype_of_the_same_size():
    projector, x = MLPProjector(4, 8).bfloat16(), torch.randn(3, 4).bfloat16()
    for _ in range(2):
        projector(x)
    for parameter in projector.linear_2.parameters():
        parameter.data = parameter.data.half()
    with pytest.raises(RuntimeError, match="dtype"):
        projector(x)
