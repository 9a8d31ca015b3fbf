"""Runs the test suite with the settings of other processors, one after another.

``python -m tests.tools.machines [pytest's arguments]`` prints a line per setting and ends with 1
if one fails. A setting is the instruction set for ATen and oneDNN, MKL's summation mode, the
number of threads, and whether SIGINT is ignored at the start, as in the background of a shell
script. For the interpreted kernels run
``python -m tests.tools.machines --device interpreter``.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


class Setting(NamedTuple):
    """Environment variables, and whether SIGINT is ignored."""

    level: str
    mkl: str
    threads: int
    ignores_sigint: bool

    def environment(self) -> dict[str, str]:
        """tests/conftest.py passes ATen's instruction set on to oneDNN."""
        return {
            "ATEN_CPU_CAPABILITY": self.level,
            "MKL_CBWR": self.mkl,
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # on a busy machine threads mostly wait for each other
        }


SETTINGS = (
    Setting("default", "COMPATIBLE", 1, False),
    Setting("default", "COMPATIBLE", 2, True),
    Setting("avx2", "AVX2", 1, True),
    Setting("avx2", "AVX2", 2, False),
    Setting("avx512", "AUTO", 1, False),
    Setting("avx512", "AUTO", 2, True),
)


def run(setting: Setting, arguments: list[str]) -> tuple[int, str]:
    """Run pytest; return its exit code and last line, and print failures."""
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *arguments],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, **setting.environment()},
        preexec_fn=ignore if setting.ignores_sigint else None,
        stdout=subprocess.PIPE,
        text=True,
    )
    failures = re.findall(r"^(?:FAILED|ERROR) .*$", found.stdout, re.MULTILINE)
    return found.returncode, "\n".join([found.stdout.strip().splitlines()[-1], *failures])


def main(arguments: list[str]) -> int:
    """Run every setting with these pytest arguments."""
    worst = 0
    for setting in SETTINGS:
        start = time.monotonic()
        code, said = run(setting, arguments)
        worst = max(worst, code)
        ignored = ", SIGINT ignored" if setting.ignores_sigint else ""
        print(
            f"{setting.level}, MKL {setting.mkl}, threads {setting.threads}{ignored} "
            f"({time.monotonic() - start:.0f} s): {said}",
            flush=True,
        )
    return int(worst != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
