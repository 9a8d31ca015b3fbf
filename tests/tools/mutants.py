"""Mutation tests: small wrong edits of the package, each of which a test must detect.

    python -m tests.tools.mutants [names]     # all, or those whose names contain one of these
    python -m tests.tools.mutants --list

Every mutant is made in a scratch copy of the repository, where its tests run until the first one
fails; that one must pass without the mutant. Ends with 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.tools.mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]


class Copy:
    """A scratch copy of the repository in which mutants are tested."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        libraries = [str(p.relative_to(ROOT)) for p in (ROOT / "vlm_fast").glob("_*.so")]
        for name in filter(None, [*listed.stdout.split("\0"), *libraries]):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target, follow_symlinks=False)

    def first_failure(self, *arguments: str) -> str | None:
        """The test that fails first, or None."""
        found = subprocess.run(
            [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *arguments],
            cwd=self.folder, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        if found.returncode == 0:
            return None
        failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", found.stdout, re.MULTILINE)
        if failed is None:
            raise RuntimeError(f"pytest {' '.join(arguments)}: {found.stdout}{found.stderr}")
        return failed[1]

    def verdict(self, mutant: Mutant) -> str:
        """The test that kills the mutant and passes without it, or the reason why none does."""
        path = self.folder / mutant.file
        text = path.read_text()
        if mutant.old not in text:
            return "its text is gone"
        path.write_text(text.replace(mutant.old, mutant.new, 1))
        try:
            failed = self.first_failure("-m", "not slow", *shlex.split(mutant.tests))
        finally:
            path.write_text(text)
        if failed is None:
            return "survived"
        device = ["--device", "interpreter"] if "interpreter" in mutant.tests else []
        if self.first_failure(*device, failed) is not None:
            return f"not tried: {failed} fails without it"
        return f"killed by {failed}"


def main(arguments: list[str]) -> int:
    """Test the mutants and print a line each; return 1 if one survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.mutants")
    parser.add_argument("--list", action="store_true", help="say which there are, try none")
    parser.add_argument("names", nargs="*", help="parts of names")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.names or any(n in m.name for n in options.names)]
    if options.list:
        print(*(f"{m.file}: {m.name}" for m in chosen), sep="\n")
        return 0
    killed = 0
    with tempfile.TemporaryDirectory() as scratch:
        copy = Copy(Path(scratch))
        for mutant in chosen:
            start = time.monotonic()
            said = copy.verdict(mutant)
            killed += said.startswith("killed")
            seconds = time.monotonic() - start
            print(f"{mutant.name} ({mutant.file}, {seconds:.0f} s): {said}", flush=True)
    print(f"{killed} of {len(chosen)} killed")
    return int(killed < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
