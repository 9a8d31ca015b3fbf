"""Read results files: which ops passed on which machine, with today's source or an older one.

The benchmark writes a results file, ``benchmarks/results/<machine>.json``, which is part of the
package. This module reads ``schema``, ``device`` ("cuda" or "cpu"), ``machine``, ``sources`` ({op:
{file: sha256}}) and ``parity`` ({op: {"dtypes": [...], "cases": n, "failures": [...]}}).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_fast.ops.declaration import Op

SCHEMA = 2
PACKAGE = Path(__file__).resolve().parent.parent
CSRC = PACKAGE / "csrc"
# In a clone vlm_fast/benchmarks is a symlink; results are written into the folder it points to.
RESULTS = (PACKAGE / "benchmarks" / "results").resolve()
IN_CLONE = PACKAGE not in RESULTS.parents

# These decide how an op is declared, checked and launched, not what it computes.
PLUMBING = {
    "_fast_launch.py", "_host.py", "_launcher.py", "_native.py", "_python_launch.py", "_sizes.py",
    "_triton.py", "argument_errors.py", "declaration.py", "docstrings.py", "fallback_reasons.py",
    "prepared_call.py", "op_arguments.py", "op_call.py", "registration.py", "signature.py",
    "verdict.py",
}  # fmt: skip


@dataclass(frozen=True)
class Proof:
    """Whether an op passed its checks on a machine, and whether its source is still the same."""

    device: str
    machine: str
    current: bool
    passed: bool
    dtypes: tuple[str, ...]

    def __str__(self) -> str:
        verdict = "verified" if self.passed else "FAILED"
        return f"{verdict} on {self.machine}" + ("" if self.current else ", with an older source")


def sources(op: Op[..., Any]) -> dict[str, str]:
    """The files that decide what an op computes, with the sha256 of each."""
    declared = Path(inspect.getsourcefile(inspect.unwrap(op.reference)) or "")
    found: dict[str, str] = {}
    todo = [declared]
    while todo:
        path = todo.pop()
        name = f"{path.parent.name}/{path.name}"
        if name in found or not path.is_file() or path.name in PLUMBING:
            continue
        text = path.read_bytes()
        found[name] = hashlib.sha256(text).hexdigest()
        if path.name == "_hopper.py":
            todo += CSRC.glob("hopper_*")
        if path.suffix == ".py":
            todo += (PACKAGE / f"{file}.py" for file in _imports(text))
    return dict(sorted(found.items()))


def _imports(text: bytes) -> Iterator[str]:
    """The kernel files and op files that a file of ``ops/`` or ``kernels/`` imports, by name."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module == "vlm_fast.kernels" or (node.level == 1 and not module):
                yield from (f"kernels/{alias.name}" for alias in node.names)
            elif module.startswith(("vlm_fast.kernels.", "vlm_fast.ops.")):
                yield module.removeprefix("vlm_fast.").replace(".", "/")
            elif node.level == 1:
                yield f"kernels/{module}"


def read_results(directory: Path = RESULTS) -> list[dict[str, Any]]:
    """The contents of all results files of this schema; broken files are left out."""
    found = []
    for path in sorted(directory.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            if content["schema"] == SCHEMA:
                found.append(content)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def proofs(op: Op[..., Any], results: list[dict[str, Any]]) -> list[Proof]:
    """The proofs of one op in the results; those of today's source come first."""
    now, found = sources(op), []
    for result in results:
        parity = result.get("parity", {}).get(op.name)
        if parity is not None:
            current = result.get("sources", {}).get(op.name) == now
            found.append(
                Proof(
                    result["device"],
                    result["machine"],
                    current,
                    parity["cases"] > 0 and not parity["failures"],
                    tuple(parity["dtypes"]),
                )
            )
    return sorted(found, key=lambda proof: (not proof.current, proof.machine))


def commit() -> str | None:
    """The commit of this clone, with a plus sign if the tree differs; None in an installed package.

    An installed package may lie in a repository of its user, whose commit says nothing.
    """
    if not IN_CLONE:
        return None
    git = ("git", "-C", str(PACKAGE.parent))
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        # A measurement writes results files; the tree counts as unchanged all the same.
        changes = ("status", "--porcelain", "--", ":!benchmarks/results")
        status = subprocess.run([*git, *changes], capture_output=True, text=True)
    except OSError:
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")
