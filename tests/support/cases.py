"""Parametrisations over all declared ops and their test shapes."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from vlm_fast import ops as ops
from vlm_fast.ops.declaration import OPS, Op
from vlm_fast.verification import tolerance
from vlm_fast.verification.tolerance import Results

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def shape_id(shape: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return "-".join(f"{name}{text(value)}" for name, value in shape.items())


# Ops with their own forward and backward on this device; the others run their reference.
ON_CPU = os.environ.get("VLM_FAST_TEST_DEVICE", "cpu") == "cpu"
OWN = {name: op for name, op in OPS.items() if not (ON_CPU and op.plain_on_cpu)}
DIFFERENTIABLE = {name: op for name, op in OWN.items() if not op.returns_indices}


def _cases(
    declared: Iterable[Op[..., Any]], name: str | None = None, values: dict[str, Any] | None = None
) -> Any:
    """Parametrises ``op`` and ``shape``: every op at each of its test shapes.

    With ``name``, every one of ``values`` is passed under it as well. Beside an op's usual shape
    all values but the first are slow: `make test` leaves them to `make test-slow`.
    """
    found = []
    for op in declared:
        for shape in op.test_shapes:
            case = f"{op.name}-{shape_id(shape)}"
            if values is None:
                found.append(pytest.param(op, shape, id=case))
                continue
            for index, (key, value) in enumerate(values.items()):
                marks = [pytest.mark.slow] if index and shape is not op.usual_shape else []
                found.append(pytest.param(op, shape, value, id=f"{case}-{key}", marks=marks))
    return pytest.mark.parametrize("op, shape" if name is None else f"op, shape, {name}", found)


# Tests with gradients use the differentiable ops (every_...), the others all ops (any_...).
every_op = pytest.mark.parametrize("op", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys())
every_case = _cases(DIFFERENTIABLE.values())
every_case_with = functools.partial(_cases, DIFFERENTIABLE.values())
any_op = pytest.mark.parametrize("op", OWN.values(), ids=OWN.keys())
any_case = _cases(OWN.values())
any_case_with = functools.partial(_cases, OWN.values())
# Also the ops that are their reference on this device: what concerns arguments alone.
declared_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
# The usual shape and the next one, which is slow: most often it has other optional arguments.
two_shapes = pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow)])


def each(result: Any) -> list[torch.Tensor]:
    """A flat list of an op's results, which may be one tensor or a nested tuple."""
    return [r for part in result for r in each(part)] if isinstance(result, tuple) else [result]


def assert_right(
    ours: Results, plain: Callable[[], Results], exact: Results, *outputs: str
) -> None:
    """Check ``ours`` by the tolerance rule; names that are not in ``outputs`` are gradients."""
    verdicts = tolerance.judge_all(ours, plain, exact, outputs=outputs)
    assert verdicts and all(v.ok for v in verdicts), [v for v in verdicts if not v.ok]


def has_compiled_code(op: Op[..., Any]) -> bool:
    """Whether a kernel that the op's file imports also has C++ code."""
    imported = vars(sys.modules[op.__module__]).values()
    homes = {getattr(v, "__module__", None) or getattr(v, "__name__", None) for v in imported}
    return any(hasattr(sys.modules.get(home), "native") for home in homes if home)
