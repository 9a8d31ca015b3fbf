"""What the host does in a call of every op, counted on a stub GPU.

    python -m tests.tools.host_budgets      # rewrites tests/ops/host_budgets.json

Like a lock file: a change is seen in review, and a test refuses more than it holds.
"""

import json
import platform
from pathlib import Path

import pytest
import torch

from tests.support import stub_gpu
from vlm_fast.kernels._triton import triton
from vlm_fast.ops.declaration import OPS

FILE = Path(__file__).resolve().parents[1] / "ops" / "host_budgets.json"


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

    def inference():
        with torch.no_grad():
            op(*args, **options)

    def differentiable():
        results = op(*trained, **options)
        results = results if isinstance(results, tuple) else (results,)
        return [r for r in results if r.requires_grad]

    gradients = [torch.zeros_like(r) for r in differentiable()]

    def training():
        torch.autograd.grad(differentiable(), leaves, gradients, allow_unused=True)

    found = {"inference": stub_gpu.host_work(inference)._asdict()}
    if gradients:
        found["training"] = stub_gpu.host_work(training)._asdict()
    return found


def main():
    patch = pytest.MonkeyPatch()
    with stub_gpu.active("c"), patch.context() as monkeypatch:
        stub_gpu.serve_cpu_tensors(monkeypatch)
        ops = {name: work_of(op) for name, op in sorted(OPS.items())}
    lines = [f'  "{name}": {json.dumps(work)}' for name, work in ops.items()]
    text = ",\n".join(lines)
    FILE.write_text(f'{{"versions": {json.dumps(versions())}, "ops": {{\n{text}\n}}}}\n')


if __name__ == "__main__":
    main()
