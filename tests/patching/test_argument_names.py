"""Matching the arguments of an override with those of a base class of another release."""

import inspect

import pytest
import torch
from torch import nn

from vlm_fast.patching.argument_names import ArgumentNames, match_arguments
from vlm_fast.patching.class_swap import swap, swap_back
from vlm_fast.patching.patched_module import PatchedModule, why_not_compatible


class Early(nn.Module):
    """A layer with the signature of an early release."""

    scale = 2.0

    def forward(self, x, head_mask=None, past_key_value=None, flag=False, **kwargs):
        return "base", x, head_mask, past_key_value, flag, kwargs


class Late(nn.Module):
    """The layer of a later release: one parameter removed, one renamed, two swapped."""

    scale = 2.0

    def forward(self, x, flag=False, cache=None, **kwargs):
        return "base", x, cache, flag, kwargs


class Override(PatchedModule):
    """An override that supports both releases and calls the base for unusual arguments."""

    scale: float

    def forward(self, x, head_mask=None, cache=None, flag=False, *, extra=None, **kwargs):
        if flag:
            return self.call_base(
                "forward", x=x, head_mask=head_mask, cache=cache, flag=flag, **kwargs
            )
        return "fast", x, head_mask, cache, extra, kwargs


def patched(kind):
    module = kind()
    swap(module, Override, ())
    return module


@pytest.mark.parametrize(
    "kind, args, kwargs, found",
    [
        (Early, (1, 2, 3), {}, ("fast", 1, 2, 3, None, {})),
        (Early, (1,), {"past_key_value": 3}, ("fast", 1, None, 3, None, {})),
        (Early, (1, 2, 3, True), {"more": 4}, ("base", 1, 2, 3, True, {"more": 4})),
        (Late, (1, False, 3), {}, ("fast", 1, None, 3, None, {})),
        (Late, (1,), {"past_key_values": 3}, ("fast", 1, None, 3, None, {})),
        (Late, (1, True), {"cache": 3}, ("base", 1, 3, True, {})),
        (Late, (), {"x": 1, "flag": True, "more": 4}, ("base", 1, None, True, {"more": 4})),
        (Late, (1,), {"extra": 5}, ("fast", 1, None, None, 5, {})),
    ],
)
def test_call_reaches_override_and_base_by_their_own_names(kind, args, kwargs, found):
    assert patched(kind)(*args, **kwargs) == found


@pytest.mark.parametrize("kind", [Early, Late])
@pytest.mark.parametrize("args, kwargs", [((), {}), ((1, 2, 3, 4, 5, 6), {}), ((1,), {"x": 1})])
def test_invalid_call_raises_the_error_of_the_base(kind, args, kwargs):
    with pytest.raises(TypeError) as theirs:
        kind()(*args, **kwargs)
    with pytest.raises(TypeError) as ours:
        patched(kind)(*args, **kwargs)
    assert str(ours.value) == str(theirs.value)


def test_signature_matches_base_class():
    for kind in (Early, Late):
        assert inspect.signature(patched(kind).forward) == inspect.signature(kind().forward)


def test_unknown_or_missing_parameter_is_a_reason_to_skip():
    def renamed(self, inputs, cache=None, **kwargs):
        return inputs

    def more(self, x, window=None):
        return x

    def any_number(self, x, *others):
        return x

    for base, said in [
        (renamed, "takes inputs, which was not read"),
        (more, "takes window, which was not read"),
        (any_number, "takes others, which was not read"),
        (lambda self, cache=None: cache, "does not take x"),
    ]:
        reason = match_arguments(base, Override.forward)
        assert isinstance(reason, str) and said in reason


def test_override_may_forward_unknown_arguments():
    def override(self, *, mask=None, **forwarded):
        return mask, forwarded

    names = match_arguments(lambda self, ids, mask, window=1: None, override)
    assert isinstance(names, ArgumentNames)
    assert names.to_override((1, 2), {"window": 3}) == {"ids": 1, "mask": 2, "window": 3}
    assert names.to_override((1,), {}) is None  # a mask is missing


def test_missing_attribute_is_a_reason_to_skip():
    class Reader(Override):
        required_attributes = ("linear.in_features",)

    module = Late()
    assert why_not_compatible(module, Override) is None
    assert why_not_compatible(module, Reader) == "linear.in_features is missing"
    module.linear = nn.Linear(2, 2)
    assert why_not_compatible(module, Reader) is None


@pytest.mark.parametrize("revert", [False, True])
def test_instance_forward_left_by_transformers_is_removed(revert):
    """transformers 4.54 to 5.1 set one on each layer whose hidden states were collected."""
    module = Late()
    if revert:
        swap(module, Override, ())
    module.forward = module.forward
    if revert:
        swap_back(module)
        assert module(1) == ("base", 1, None, False, {})
    else:
        swap(module, Override, ())
        assert module(1) == ("fast", 1, None, None, None, {})
    assert "forward" not in vars(module)


def test_instance_forward_set_by_users_is_kept():
    module = Late()
    module.forward = lambda x: torch.zeros(x)
    swap(module, Override, ())
    assert module(2).shape == (2,)
