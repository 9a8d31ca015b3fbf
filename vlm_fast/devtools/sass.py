"""Count registers, stack and instructions by kind in a compiled kernel."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_fast.kernels._triton import triton

INSTRUCTION_BYTES = 16  # on NVIDIA since sm_70
NVIDIA = {
    "spills": re.compile(r"\b(?:LDL|STL)\b"),
    "tensor_core": re.compile(r"\b(?:UTC)?[A-Z]G?MMA\b"),
    "tma": re.compile(r"\bUTMA(?:LDG|STG|REDG)\b"),
    "wide_loads": re.compile(r"\bLDG\.\S*\b(?:128|256)\b"),
    "wide_stores": re.compile(r"\bSTG\.\S*\b(?:128|256)\b"),
    "loads": re.compile(r"\b(?:LDG|LDGSTS)\b"),
    "stores": re.compile(r"\bSTG\b"),
    "async_loads": re.compile(r"\bLDGSTS\.\S*\b128\b"),
}
AMD = {
    "tensor_core": re.compile(r"\bv_(?:mfma|wmma)_"),
    "wide_loads": re.compile(r"\b(?:global|buffer)_load_(?:dwordx4|b128)\b"),
    "wide_stores": re.compile(r"\b(?:global|buffer)_store_(?:dwordx4|b128)\b"),
    "loads": re.compile(r"\b(?:global|buffer)_load_"),
    "stores": re.compile(r"\b(?:global|buffer)_store_"),
}


def inspect(compiled: Sequence[Mapping[str, Any]], arch: str) -> list[dict[str, int]]:
    """Registers, stack and instruction counts of kernels for one architecture.

    Args:
        compiled: Triton's ``asm`` dictionary of each kernel.
        arch: such as "sm_90" or "gfx942".

    Raises:
        RuntimeError: NVIDIA's tools print something unexpected.
    """
    if arch.startswith("gfx"):
        return [_amd(asm["amdgcn"]) for asm in compiled]
    cubins = [asm["cubin"] for asm in compiled]
    counts = _count(cubins, arch)
    return [_usage(cubin) | counted for cubin, counted in zip(cubins, counts, strict=True)]


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes per thread, read by cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump told no resources: {usage!r}")
    return {"registers": int(match[1]), "stack_bytes": int(match[2])}


def _count(cubins: Sequence[bytes], arch: str) -> list[dict[str, int]]:
    """Number of instructions of each kind in each kernel."""
    # All kernels go into one file, because starting nvdisasm takes longer than compiling a small
    # kernel.
    parts = [code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(parts))
        file.flush()
        model = arch.replace("sm_", "SM")
        listing = _output(triton.knobs.nvidia.nvdisasm.path, "-ndf", "-b", model, file.name)
    # Lines of instructions start with an address.
    lines = [line for line in listing.splitlines() if re.match(r"\s*/\*[0-9a-f]+\*/", line)]
    if INSTRUCTION_BYTES * len(lines) != sum(map(len, parts)):
        raise RuntimeError(f"nvdisasm left out instructions of {arch}")
    found, first = [], 0
    for size in map(len, parts):
        last = first + size // INSTRUCTION_BYTES
        text = "\n".join(lines[first:last])
        found.append({kind: len(pattern.findall(text)) for kind, pattern in NVIDIA.items()})
        first = last
    return found


def _amd(assembly: str) -> dict[str, int]:
    def noted(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(match[1]) if match else 0

    return {
        "registers": noted("vgpr_count"),
        "stack_bytes": noted("private_segment_fixed_size"),
        "spills": noted("vgpr_spill_count") + noted("sgpr_spill_count"),
        "tma": 0,
        "async_loads": 0,
        **{kind: len(pattern.findall(assembly)) for kind, pattern in AMD.items()},
    }


def code(cubin: bytes) -> bytes:
    """The .text section of a cubin, an ELF file with one kernel."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry) for i in range(count)]
    for name, _, _, _, start, size in sections:
        if cubin.startswith(b".text.", sections[names][4] + name):
            return cubin[start : start + size]
    raise RuntimeError("a cubin without code")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
