"""Declarations of op arguments: malformed ones are refused, and the predicate reads each line."""

import pytest
import torch

from vlm_fast.ops.argument_errors import mistake
from vlm_fast.ops.signature import Signature


@pytest.mark.parametrize(
    "declared, where, words",
    [
        ({"x": "floating (rows, cols"}, {}, "no declaration of a tensor"),
        ({"x": "flaoting (rows)"}, {}, "names no dtype"),
        ({"x": "floating (rows)", "n": "integer"}, {}, "no declaration of an option"),
        ({"x": "floating (rows)", "m": "int"}, {}, "arguments declared"),
        ({}, {}, "missing"),
        ({"x": "floating (rows)"}, {"rwos > 0": "x: rows"}, "bound by no argument"),
        ({"x": "floating (2 * rwos)"}, {}, "bound by no argument"),
    ],
)
def test_malformed_declaration_raises(declared, where, words):
    with pytest.raises(ValueError, match=words):
        Signature("some_op", ["x"], ["n"], declared, where)


def test_sizes_bind_match_and_broadcast():
    declared = {
        "x": "floating (*rows, cols)",
        "bias": "like x or float32 (1|cols) or None",
        "mask": "bool (*rows) or None",
        "index": "int32 (prod(rows), n)",
    }
    signature = Signature("some_op", list(declared), ["n"], declared, {"cols > n": "x: more cols"})

    def call(x=(2, 3, 5), bias=(5,), mask=(2, 3), index=(6, 4), n=4):
        made = [torch.zeros(x), torch.zeros(bias) if bias else None]
        made += [torch.zeros(mask, dtype=torch.bool) if mask else None]
        made += [torch.zeros(index, dtype=torch.int32)]
        fits = signature.accepts(*made, n=n)
        assert fits == (mistake(signature, made, {"n": n}) is None)
        return fits

    assert call() and call(bias=(1,)) and call(bias=None, mask=None)
    assert call(x=(5,), mask=None, index=(1, 4))
    assert not call(bias=(4,)) and not call(bias=(1, 5)) and not call(mask=(3, 2))
    assert not call(index=(5, 4)) and not call(index=(6, 3)) and not call(n=3)
    assert not call(x=(2, 3, 4), bias=(4,))  # cols > n
