"""Kernels are correct with other tile sizes than their default."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.support.cases import any_case, any_op
from tests.support.op_accuracy import assert_accurate
from vlm_fast.kernels import _launcher

pytestmark = pytest.mark.devices("interpreter", "cuda")


def use(monkeypatch, changed):
    """Launch every kernel with ``changed(size)`` in place of each block size."""
    for kernel in _launcher.KERNELS.values():
        configs = tuple(
            dataclasses.replace(c, blocks={name: changed(n) for name, n in c.blocks.items()})
            for c in kernel.configs
        )
        monkeypatch.setattr(kernel, "configs", configs)


@pytest.mark.parametrize(
    "changed", [lambda size: max(size // 2, 1), lambda size: size * 2], ids=["half", "double"]
)
@any_op
def test_parity_with_other_tile_sizes(device, monkeypatch, op, changed):
    use(monkeypatch, changed)
    assert_accurate(op, *op.sample(op.usual_shape, torch.bfloat16, device), layout="padded rows")


@any_case
def test_parity_with_many_small_tiles(device, monkeypatch, op, shape):
    """With small tiles every loop has several iterations; test shapes fit into one usual tile."""
    use(monkeypatch, lambda size: min(size, 16))
    assert_accurate(op, *op.sample(shape, torch.bfloat16, device), layout="padded rows")
