"""Installs transformers releases beside `.venv` and tests every family under each.

    python -m tests.tools.releases [releases]             # the suite under each, or all
    python -m tests.tools.releases --install [releases]   # their folders alone

The suite of a release runs in a separate process. Results are written to
`tests/tools/served.json`, which is reviewed like a lock file, and from there to the tables in docs
and README. Failures in a release are printed and not written.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
RELEASES = (
    "4.49.0", "4.53.3", "4.56.2", "4.57.6", "5.0.0", "5.4.0", "5.8.1", "5.12.1", "5.14.1",
    "5.17.0", "5.20.2", "5.24.0",
)  # fmt: skip
SERVED = ROOT / "tests" / "tools" / "served.json"
Cell = dict[str, Any]


# ---- folders of releases ----


def folder(release: str) -> Path:
    return ROOT / f".venv-transformers-{release}"


def install(release: str, pip: Callable[..., None] | None = None) -> None:
    """Install a release, and those of its requirements that the environment does not satisfy.

    A folder with an incomplete installation, or for another environment, is replaced.
    """
    path, pip = folder(release), pip or run_pip
    if (path / "installed").exists() and not any(missing(path, "transformers", set())):
        return
    shutil.rmtree(path, ignore_errors=True)
    pip(path, f"transformers=={release}")
    before: list[str] = []
    while wanted := sorted(set(missing(path, "transformers", set()))):
        if wanted == before:
            raise RuntimeError(
                f"{path.name} still lacks {', '.join(wanted)} after their installation"
            )
        pip(path, *wanted)
        before = wanted
    (path / "installed").touch()


def run_pip(path: Path, *requirements: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--upgrade", "--target", str(path), *requirements]
    subprocess.run(command, check=True)


def missing(path: Path, name: str, seen: set[str]) -> Iterator[str]:
    """Unsatisfied requirements of a distribution and of its installed requirements."""
    for text in distribution(path, name).requires or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        required = canonicalize_name(requirement.name)
        try:
            version = distribution(path, required).version
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name}{requirement.specifier}"
        elif required not in seen:
            seen.add(required)
            yield from missing(path, required, seen)


def distribution(path: Path, name: str) -> importlib.metadata.Distribution:
    """The distribution in the folder, or else in the environment."""
    own = importlib.metadata.distributions(name=name, path=[str(path)])
    return next(iter(own), None) or importlib.metadata.distribution(name)


# ---- the suite under a release ----


def examine(release: str) -> dict[str, Any]:
    """Run `across_releases` under a release; returns ``cases`` by name and the ``release``."""
    paths = [str(ROOT)]
    if release != importlib.metadata.version("transformers"):
        install(release)
        paths.insert(0, str(folder(release)))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "found.json")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "tests.support.across_releases", "--out", str(out)]
        ran = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        if not out.exists():
            raise RuntimeError(f"{release}: the suite ended with {ran.returncode}: {ran.stderr}")
        found = json.loads(out.read_text())
    if found["release"] != release:
        raise RuntimeError(f"{found['release']} ran in the place of {release}")
    wrong = [cell["why"] for cell in found["cases"].values() if cell["outcome"] == "wrong"]
    print(
        f"{release} ({time.monotonic() - start:.0f} s): {len(wrong)} wrong",
        *wrong,
        sep="\n",
        flush=True,
    )
    return found


def served() -> dict[str, dict[str, Cell]]:
    """Results of `across_releases.examine_family` by case and release, from the file."""
    return json.loads(SERVED.read_text()) if SERVED.exists() else {}


def written(cells: dict[str, dict[str, Cell]]) -> str:
    """The text of the file, with one line per cell."""
    cases = []
    for case, releases in cells.items():
        lines = [f"  {json.dumps(r)}: {json.dumps(releases[r])}" for r in RELEASES if r in releases]
        cases.append(f" {json.dumps(case)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(cases) + "\n}\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.releases")
    parser.add_argument("--install", action="store_true", help="make the folders, run nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="releases at once")
    parser.add_argument("releases", nargs="*", default=RELEASES)
    options = parser.parse_args(arguments)
    if options.install:
        for release in options.releases:
            install(release)
        return 0
    from tests.tools import releases_table  # which imports torch

    unknown = set(options.releases) - set(RELEASES)
    if unknown:
        parser.error(f"no table holds {', '.join(sorted(unknown))}, only {', '.join(RELEASES)}")
    wrong = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for found in pool.map(examine, options.releases):
            cells = merged(served(), found)
            SERVED.write_text(written(cells))
            releases_table.write(cells)
            wrong += sum(cell["outcome"] == "wrong" for cell in found["cases"].values())
    return int(wrong > 0)


def merged(cells: dict[str, dict[str, Cell]], found: dict[str, Any]) -> dict[str, dict[str, Cell]]:
    """The cells updated with those of one release, without wrong results."""
    after = {}
    for case, cell in found["cases"].items():
        after[case] = {r: c for r, c in cells.get(case, {}).items() if r != found["release"]}
        if cell["outcome"] != "wrong":
            after[case][found["release"]] = cell
    return after


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
