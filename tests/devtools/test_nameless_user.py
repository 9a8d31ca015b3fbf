"""A user id without a passwd entry, as in containers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMELESS = """
import os, pwd, runpy, sys

def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = getpwuid
"""
PATCHES = """
import torch, vlm_fast
from tests.support.tiny_llava import llava, prompt
model = llava()
vlm_fast.patch(model)
print(vlm_fast.verify(model, **prompt()).ok)
"""
COMMAND = (
    "sys.argv = ['vlm-fast', {}]\nrunpy.run_module('vlm_fast.cli.main', run_name='__main__')\n"
)
CALLS = {
    "a patched model": PATCHES,
    "vlm-fast env": COMMAND.format("'env'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("home", [True, False], ids=["HOME", "no HOME"])
@pytest.mark.parametrize("call", CALLS)
def test_calls_work_without_a_user_name(call, home, tmp_path):
    names = ("USER", "LOGNAME", "LNAME", "USERNAME", "HOME")
    environment = {n: v for n, v in os.environ.items() if n not in names}
    environment |= {"PYTHONPATH": str(ROOT)}
    environment |= {"HOME": str(tmp_path)} if home else {}
    found = subprocess.run(
        [sys.executable, "-c", NAMELESS + CALLS[call]], env=environment, cwd=ROOT,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
