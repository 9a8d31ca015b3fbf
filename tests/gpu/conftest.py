"""The suites of this folder need a CUDA device and fail without one; `make gpu` runs them."""

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    assert torch.cuda.is_available(), "no CUDA device"
    return "cuda"
