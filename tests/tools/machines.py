"""The suite as other processors run it, one setting after another, on this one.

``python -m tests.tools.machines [pytest's arguments]`` prints a line per setting and ends with 1
if one fails. A setting is what ATen and oneDNN are told that the processor can do, how MKL sums,
how many threads there are, and whether SIGINT was ignored at the start, as it is in the
background of a shell script. Triton's interpreter is a suite of its own:
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
        """tests/conftest.py tells oneDNN what ATen is told."""
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
    """The exit code, and pytest's last line; failures are printed as they are found."""
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
    """Every setting with these arguments of pytest."""
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
