"""A user's table in a cache that is not there, of a GPU that is not there."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.test_configs import OnGpu
from vlm_fast.kernels import _configs, _user_table
from vlm_fast.kernels._launcher import KERNELS

GPU = "NVIDIA Test/../GPU"
NAME = _configs.table_name((9, 0), GPU)
KERNEL = KERNELS["merge_image_tokens_kernel"]  # six configs
CHOICE = {KERNEL.name: {"bfloat16": {"1024": 3}}}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty private cache, one GPU that is not there, and nothing read yet."""
    monkeypatch.setenv("VLM_FAST_CACHE_DIR", str(tmp_path / "cache"))
    for name in (_user_table.SWITCH, "WORLD_SIZE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    properties = SimpleNamespace(major=9, minor=0, name=GPU)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
    _configs.forget()
    _user_table.warn.cache_clear()
    yield tmp_path / "cache" / "configs"
    monkeypatch.undo()
    _configs.forget()
    _user_table.warn.cache_clear()


def chosen(size=1024):
    """The index that a launch would take, and what it warned of."""
    _configs.forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        index = KERNEL.configs.index(KERNEL.choose(OnGpu, size))
    return index, [str(warning.message) for warning in caught]
