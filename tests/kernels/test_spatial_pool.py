"""The kernels of `spatial_pool` at grids that the op's own shapes do not have."""

import pytest
import torch

from tests.support.op_accuracy import assert_accurate
from vlm_fast.kernels import spatial_pool as kernels
from vlm_fast.kernels._launcher import Config
from vlm_fast.ops.declaration import OPS

pytestmark = pytest.mark.devices("interpreter", "cuda")

POOL = OPS["spatial_pool"]


def test_a_side_whose_square_does_not_fit_in_int32(device, monkeypatch):
    for kernel in (kernels.spatial_pool_kernel, kernels.spatial_pool_backward_kernel):
        few_programs = Config({"TOKENS": 4096, "COLS": 1}, num_warps=8)
        monkeypatch.setattr(kernel, "configs", (few_programs,))
    shape = dict(batch=1, height=1, width=50_001, features=1, mode="bilinear")
    assert_accurate(POOL, *POOL.sample(shape, device=device))


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("height, width", [(3, 27), (7, 3)])
@pytest.mark.parametrize("mode", ["avg", "max", "bilinear"])
def test_grids_that_windows_do_not_fill(device, mode, height, width, stride):
    shape = dict(batch=2, height=height, width=width, features=10, mode=mode, stride=stride)
    assert_accurate(POOL, *POOL.sample(shape, torch.bfloat16, device))
