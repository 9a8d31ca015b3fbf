"""The compiled CPU code, if it is built, and its stand-in from ATen."""

import sys

import pytest
from kernel_properties import *  # noqa: F403

from vlm_fast.kernels._native import native


@pytest.fixture(params=["ATen", *(["native"] if native is not None else [])])
def device(request, monkeypatch):
    if request.param == "ATen":
        for name, module in list(sys.modules.items()):
            if name.startswith("vlm_fast.kernels.") and hasattr(module, "native"):
                monkeypatch.setattr(module, "native", None)
    return "cpu"
