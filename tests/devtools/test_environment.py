"""``vlm-fast env`` reports unwritable homes, unknown users and missing drivers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlm_fast.devtools import environment
from vlm_fast.kernels import _triton

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
NOBODY = """
import os, pwd
def nobody(*_):
    raise KeyError("getpwuid(): uid not found: 54321")
pwd.getpwuid = pwd.getpwnam = nobody
for name in ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
"""
FACTS = """
from vlm_fast.devtools.environment import facts
for fact in facts():
    print(fact.name, "|", fact.value, "|", fact.cause, "|", fact.remedy)
"""
WORKS = """
import torch, vlm_fast
from vlm_fast.modules import MLPProjector
with vlm_fast.strict():
    MLPProjector(8, 8)(torch.randn(2, 3, 8)).sum().backward()
"""


def run(code, **environment):
    made = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    made.pop("TRITON_INTERPRET", None)
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME", "XDG_CACHE_HOME"):
        made.pop(name, None)
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=made,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    return dict(line.split(" | ", 1) for line in found.stdout.splitlines() if " | " in line)


@needs_triton
def test_unwritable_home_is_reported():
    said = run(FACTS, HOME="/proc/nowhere")  # a path that not even root can write to
    assert "/proc cannot be written: " in said["triton cache"]
    assert "set TRITON_CACHE_DIR" in said["triton cache"]


@needs_triton
def test_writable_home_reports_nothing(tmp_path):
    said = run(FACTS, HOME=str(tmp_path / "new"))
    assert said["triton cache"] == f"{tmp_path}/new/.triton/cache |  | "
    assert not list(tmp_path.iterdir())


@needs_triton
def test_user_without_passwd_entry_is_reported():
    said = run(NOBODY + WORKS + FACTS)
    assert "there is no home directory" in said["triton cache"]


@needs_triton
@pytest.mark.parametrize(
    "error, words",
    [
        (FileNotFoundError(2, "No such file or directory", "/sbin/ldconfig"), "/sbin/ldconfig"),
        (subprocess.CalledProcessError(1, ["/sbin/ldconfig", "-p"]), "exit status 1"),
        (b"libc.so.6 => /lib/libc.so.6", "libcuda.so cannot found"),
    ],
    ids=["no ldconfig", "ldconfig fails", "not in its list"],
)
def test_missing_driver_is_reported(monkeypatch, error, words):
    def ldconfig(*_, **options):
        if isinstance(error, Exception):
            raise error
        return error

    from triton.backends.nvidia import driver

    monkeypatch.setattr(driver, "libcuda_dirs", driver.libcuda_dirs.__wrapped__)  # not cached
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "check_output", ldconfig)
    for name in ("TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    (fact,) = environment._driver_library()
    assert fact.value == "not found" and words in fact.cause
    assert "TRITON_LIBCUDA_PATH" in fact.remedy
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", "/opt/driver")
    (fact,) = environment._driver_library()
    assert (fact.value, fact.cause) == ("/opt/driver", "")
