"""The suites of this folder run kernels through Triton's interpreter, on CPU tensors."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "tests/interpreted needs its own process: "
        "TRITON_INTERPRET=1 python -m pytest tests/interpreted"
    )

from tests.interpreted import bounds
from tests.support import interpreter_fixes

interpreter_fixes.apply()
bounds.enforce()


@pytest.fixture(scope="session")
def device():
    return "cpu"
