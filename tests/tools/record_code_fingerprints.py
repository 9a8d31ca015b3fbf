"""Records fingerprints of the transformers code that patches replace: ``code_fingerprints.json``.

    python -m tests.tools.record_code_fingerprints [releases]  # by default all

Under each release every family is patched and run, and the methods are collected whose code is
checked. Then the fingerprints of these methods are taken from the sources of every release. Run
this only after reading the code, and after ``make versions`` found the families equal.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from tests.tools import releases
from vlm_fast.modules.parameter_access import activation, code_fingerprints, norm, original_code
from vlm_fast.patching.models import patch_merger, pixel_shuffle

# Classes that are recognised by name, wherever they are defined.
NAMED = (
    *norm.LLAMA_RMS_NORMS, *norm.GEMMA_RMS_NORMS, *patch_merger.MERGERS.values(),
    *patch_merger.UNFOLDING_PROJECTORS.values(), *patch_merger.UNFOLDING_MERGERS.values(),
    *pixel_shuffle.GATED.values(),
)  # fmt: skip


def source(release: str) -> Path:
    """The source folder of a transformers release."""
    folder = releases.folder(release)
    if folder.exists():
        return folder / "transformers"
    found = importlib.util.find_spec("transformers")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def checked_methods() -> set[str]:
    """Methods whose code is checked in the installed release."""
    from tests.support.families import CASES, build

    names: set[str] = set()

    def note(definer: type, method: str, function: object) -> None:
        name = code_fingerprints.name_of(definer, method)
        if name is not None:
            names.add(name)

    import vlm_fast

    original_code.why_not_known_code = note
    warnings.simplefilter("ignore")
    for case in CASES:
        try:
            model, inputs = build(case)
            model = CASES[case].prepare(model)
            vlm_fast.patch(model)
            model(**inputs)
            model.train()(**inputs)
        except Exception as error:  # tests.support.across_releases says whether that is a fault
            print(f"{case}: {type(error).__name__}", file=sys.stderr)
    return names


def checked_methods_under(release: str) -> set[str]:
    """Methods whose code is checked under a release, found in a new process."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "names.json")
        paths = [str(releases.ROOT)]
        if releases.folder(release).exists():
            paths.insert(0, str(releases.folder(release)))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "tests.tools.record_code_fingerprints",
            "--checked-methods",
            str(out),
        ]
        subprocess.run(command, cwd=releases.ROOT, env=environment, check=True)
        return set(json.loads(out.read_text()))


def methods_recognised_by_name(root: Path) -> Iterator[str]:
    """The forwards of classes that are recognised by name in a release, and of activations."""
    for path in root.glob("models/*/*.py"):
        for kind in re.findall(r"^class (\w+)", path.read_text(encoding="utf8"), flags=re.M):
            if kind in NAMED:
                yield ".".join((*path.relative_to(root).with_suffix("").parts, kind, "forward"))
    for kind in activation._TRANSFORMERS:
        yield f"activations.{kind}.forward"


def fingerprints(names: set[str], roots: list[Path]) -> dict[str, list[str]]:
    """Fingerprints of each method in the releases that have it."""
    found: dict[str, set[str]] = {}
    trees: dict[Path, ast.Module] = {}
    for name in sorted(names):
        home, kind, method = name.rsplit(".", 2)
        for root in roots:
            path = root / f"{home.replace('.', '/')}.py"
            if not path.exists():
                continue
            if path not in trees:
                trees[path] = ast.parse(path.read_text(encoding="utf8"))
            definition = code_fingerprints.definition_of(trees[path], kind, method)
            if definition is not None:
                found.setdefault(name, set()).add(
                    code_fingerprints.fingerprint_of_source(definition)
                )
    return {name: sorted(of_name) for name, of_name in found.items()}


def as_text(found: dict[str, list[str]]) -> str:
    """The fingerprints as JSON, a line for each method."""
    lines = [f" {json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--checked-methods"]:
        Path(arguments[1]).write_text(json.dumps(sorted(checked_methods())))
        return
    names = {
        name
        for release in arguments or releases.RELEASES
        for name in checked_methods_under(release)
    }
    roots = [source(release) for release in releases.RELEASES]
    for root in roots:
        names |= set(methods_recognised_by_name(root))
    names |= code_fingerprints.KNOWN.keys()
    code_fingerprints.PATH.write_text(as_text(fingerprints(names, roots)))


if __name__ == "__main__":
    main(sys.argv[1:])
