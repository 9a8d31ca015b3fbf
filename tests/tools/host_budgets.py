"""What the host does in a call of every op and of patched connectors, counted on a stub GPU.

    python -m tests.tools.host_budgets      # rewrites host_budgets.json of tests/ops and patching

Like lock files: a change is seen in review, and a test refuses more than they hold.
"""

import json
import platform
from functools import partial
from pathlib import Path

import pytest
import torch

import vlm_fast
from tests.support import stub_gpu
from tests.support.connectors_of_every_kind import CONNECTORS, call
from tests.support.patched_layers import LAYERS
from vlm_fast.kernels._triton import triton
from vlm_fast.ops.declaration import OPS

TESTS = Path(__file__).resolve().parents[1]
FILE = TESTS / "ops" / "host_budgets.json"
CONNECTORS_FILE = TESTS / "patching" / "host_budgets.json"
PATCHED = {name: made for name, made in {**CONNECTORS, **LAYERS}.items() if "patched" in name}


def versions():
    """What counts depend on beside this package."""
    python = ".".join(platform.python_version_tuple()[:2])
    torch_version = torch.__version__.split("+")[0]
    return {"python": python, "torch": torch_version, "triton": triton.__version__}


def work_of(op):
    """The work of a call in bf16 at the op's usual shape, by kind of call."""
    args, options = op.sample(op.usual_shape, torch.bfloat16)
    leaves = []

    def leaf(value):
        if isinstance(value, list):
            return [leaf(v) for v in value]
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]
        return value

    trained = [leaf(value) for value in args]

    return work_of_call(partial(op, *args, **options), partial(op, *trained, **options), leaves)


def work_of_connector(name):
    """The work of a call of a small patched connector in bf16, by kind of call.

    Raises:
        ValueError: a part of it did not run as an op.
    """
    module = PATCHED[name].build()[0].bfloat16()
    given = {
        argument: value.bfloat16()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for argument, value in PATCHED[name].given().items()
    }
    vlm_fast.stats(reset=True)
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = work_of_call(*[partial(call, module, given)] * 2, parameters)
    fallbacks = [reason for count in vlm_fast.stats().values() for reason in count["fallback"]]
    if fallbacks:
        raise ValueError(f"{name}: {fallbacks}")
    return found


def work_of_call(function, trained, leaves):
    """The work of ``function()`` without gradients, and of ``trained()`` with its backward."""

    def inference():
        with torch.no_grad():
            function()

    def differentiable():
        results = trained()
        results = results if isinstance(results, tuple) else (results,)
        return [r for r in results if r.requires_grad]

    gradients = [torch.zeros_like(r) for r in differentiable()]

    def training():
        torch.autograd.grad(differentiable(), leaves, gradients, allow_unused=True)

    found = {"inference": stub_gpu.host_work(inference)._asdict()}
    if gradients:
        found["training"] = stub_gpu.host_work(training)._asdict()
    return found


def assert_within(found, budgets, same_versions):
    """Check the work of each kind of call; if versions differ only launches.

    ATen calls, allocations and paths through torch vary with its version.
    """
    for kind, work in found.items():
        budget = budgets[kind]
        assert work["by_triton"] == 0, kind
        assert work["launches"] <= budget["launches"], kind
        if same_versions:
            over = [what for what in budget if work[what] > budget[what]]
            assert not over, f"{kind}: {over} of {work}, not {budget}"


def write(file, title, work):
    lines = ",\n".join(f'  "{name}": {json.dumps(found)}' for name, found in work.items())
    file.write_text(f'{{"versions": {json.dumps(versions())}, "{title}": {{\n{lines}\n}}}}\n')


def main():
    patch = pytest.MonkeyPatch()
    with stub_gpu.active("c"), patch.context() as monkeypatch:
        stub_gpu.serve_cpu_tensors(monkeypatch)
        write(CONNECTORS_FILE, "connectors", {name: work_of_connector(name) for name in PATCHED})
        write(FILE, "ops", {name: work_of(op) for name, op in sorted(OPS.items())})


if __name__ == "__main__":
    main()
