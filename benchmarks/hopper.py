"""``python -m vlm_fast.benchmarks.hopper``: what the compiler made of the Hopper GEMMs.

No GPU is needed. Exit codes: 0 ok; 1 a kernel takes too many registers, spills, or lacks tensor
cores or TMA; 3 there is no library, or no Triton, whose disassembler this takes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from vlm_fast import terminal
from vlm_fast.devtools import sass
from vlm_fast.kernels import _hopper
from vlm_fast.kernels._triton import AVAILABLE, triton

REGISTERS = 168  # of a thread at the start: three warp groups share the 65,536 there are
ARCH = "sm_90a"
NAMES = ("gelu_backward", "linear_gelu")  # as they are linked, see setup.py
COLUMNS = ("kernel", "registers", "stack_bytes", "spills", "tensor_core", "tma")


def cubins(library: Path) -> list[bytes]:
    """The code of each kernel, in the order in which the library was linked."""
    with tempfile.TemporaryDirectory() as folder:
        command = [triton.knobs.nvidia.cuobjdump.path, "-xelf", "all", str(library.resolve())]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        paths = sorted(Path(folder).glob("*.sm_90*.cubin"), key=_number)
        return [path.read_bytes() for path in paths]


def _number(path: Path) -> int:
    return int(re.findall(r"\.(\d+)\.sm_", path.name)[0])


def violations(symbol: str, found: dict[str, int]) -> list[str]:
    """What is wrong with one kernel, one line each."""
    wrong = []
    if found["registers"] > REGISTERS:
        wrong.append(f"{symbol}: {found['registers']} registers, more than {REGISTERS}")
    if found["stack_bytes"] or found["spills"]:
        wrong.append(f"{symbol}: {found['spills']} spills, {found['stack_bytes']} bytes of stack")
    wrong += [f"{symbol}: no {kind}" for kind in ("tensor_core", "tma") if not found[kind]]
    return wrong


def main() -> int:
    cause = _hopper.why_absent or (None if AVAILABLE else "Triton is not installed")
    if cause is not None:
        print(f"vlm_fast.benchmarks.hopper: nothing to look into: {cause}", file=sys.stderr)
        return 3
    library = Path(_hopper.native.__file__)
    code = cubins(library)
    if len(code) != len(NAMES):
        print(f"{library.name} holds {len(code)} kernels, not {len(NAMES)}")
        return 1
    found = sass.inspect([{"cubin": cubin} for cubin in code], ARCH)
    rows, wrong = [], []
    for name, counts in zip(NAMES, found, strict=True):
        rows.append([name, *(counts[column] for column in COLUMNS[1:])])
        wrong += violations(name, counts)
    terminal.show(f"{library.name} ({library.stat().st_size:,} bytes)", COLUMNS, rows)
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
