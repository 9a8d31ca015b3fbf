"""Kernels are right at every tile size, not only at that of their first config."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.support.cases import any_case, any_op, usual_shape
from tests.support.op_accuracy import judged
from tests.support.selection import slow_but
from vlm_fast.kernels import _launcher

pytestmark = pytest.mark.devices("interpreter", "cuda")


def use(monkeypatch, config_of):
    for kernel in _launcher.KERNELS.values():
        config = config_of(kernel)
        monkeypatch.setattr(kernel, "choose", lambda tensor, size, config=config: config)


@pytest.mark.parametrize("index", slow_but([1, 2, 3], range(1, 8)))
@any_op
def test_every_config(device, monkeypatch, op, index):
    use(monkeypatch, lambda kernel: kernel.configs[index % len(kernel.configs)])
    judged(op, *op.sample(usual_shape(op), torch.bfloat16, device), layout="padded rows")


@any_case
def test_many_small_tiles(device, monkeypatch, op, shape):
    """Test shapes fit into one tile of most configs; with these, every loop goes round."""

    def small(kernel):
        first = kernel.configs[0]
        blocks = {name: min(size, 16) for name, size in first.blocks.items()}
        return dataclasses.replace(first, blocks=blocks)

    use(monkeypatch, small)
    judged(op, *op.sample(shape, torch.bfloat16, device), layout="padded rows")
