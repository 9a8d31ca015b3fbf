"""The wheel, built from the sdist: every command works as in the repository."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vlm_fast.cli import main
from vlm_fast.kernels import _triton
from vlm_fast.kernels._triton import AVAILABLE

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
OP = "gather_image_tokens"
SAME = {  # commands whose output does not depend on the load of the machine
    "ops": ["ops", "--json"],
    "check": ["check", OP, "--json"],
    "advise": ["advise", "--scenario", "concurrency", "--memory", "24GB", "--json"],
    "recipe": ["recipe", "--help"],
    "data check": ["data", "check", "--data", "mix.json", "--images", ".", "--json"],
}
TRITON = {
    "compile": ["compile", "--op", OP, "--arch", "sm_90", "--check", "--json"],
}
OTHERS = {
    "env": ["env", "--json"],
    "bench": ["bench", "--quick", "--op", OP, "--provider", "eager", "--json", "bench.json"],
    "profile": ["profile", "--connector", "linear", "--tokens", "576", "--budget", "1"],
}
COMMANDS = SAME | OTHERS | (TRITON if AVAILABLE else {})

# One process runs all commands; both sides lack the compiled extension, which is not built here.
DRIVER = """
import json, sys
sys.modules["vlm_fast._C"] = None
import vlm_fast
from typer.testing import CliRunner
from vlm_fast.cli import main
said = {}
for name, arguments in json.loads(sys.argv[1]).items():
    found = CliRunner().invoke(main.app, arguments)
    said[name] = [found.exit_code, found.stdout, found.stderr, repr(found.exception)]
print(json.dumps({"package": vlm_fast.__file__, "said": said}))
"""


def run(*arguments, **options):
    found = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=600,
        **options,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder where the sdist's wheel is installed; dist/ beside it holds the clone's wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    clone = folder / "clone"
    leave = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("vlm_fast", "kernels", "benchmarks", "csrc"):
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=leave)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, clone)
    environment = {**os.environ, "VLM_FAST_BUILD_EXT": "0"}
    build = (
        "from setuptools import build_meta as b; b.build_wheel('../dist'); b.build_sdist('../dist')"
    )
    run("-c", build, cwd=clone, env=environment)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "--no-compile", "--quiet")
    target = folder / "elsewhere" / "site"
    run("-m", "pip", "install", *offline, "--target", target, sdist, env=environment)
    if shutil.which("git"):  # a user's repository that contains the installed package
        identity = ("-c", "user.name=someone", "-c", "user.email=someone@else.where")
        for words in (("init",), (*identity, "commit", "--allow-empty", "--message", "theirs")):
            subprocess.run(["git", *words], cwd=target.parent, capture_output=True, check=True)
    return target


@pytest.fixture(scope="module")
def both(site):
    """The output of every command from the wheel and from this repository."""
    said = []
    installed_alone = {"save": ["bench", "--save", "--op", OP]}
    for path, folder, more in (
        (site, site.parent, installed_alone),
        (ROOT, site.parent.parent, {}),
    ):
        (folder / "mix.json").write_text(json.dumps([{"id": "no conversations"}]))
        # The Triton of this process, which the budgets are of: it may lie outside site-packages.
        triton = [str(Path(_triton.triton.__file__).parents[1])] if AVAILABLE else []
        paths = os.pathsep.join([str(path), *triton])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        output = run("-c", DRIVER, json.dumps(COMMANDS | more), cwd=folder, env=environment)
        found = json.loads(output.splitlines()[-1])
        assert Path(found["package"]) == path / "vlm_fast" / "__init__.py"
        said.append((folder, found["said"]))
    return said


def test_wheel_from_sdist_equals_wheel_from_clone(site):
    (wheel,) = (site.parent.parent / "dist").glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("vlm_fast/")}
    installed = {f.relative_to(site).as_posix() for f in site.glob("vlm_fast/**/*") if f.is_file()}
    assert packed == installed
    sources = {f"vlm_fast/{f.relative_to(ROOT / 'vlm_fast')}" for f in ROOT.glob("vlm_fast/**/*")}
    for folder in ("kernels", "benchmarks"):
        files = (ROOT / folder).rglob("*")
        sources |= {f"vlm_fast/{file.relative_to(ROOT).as_posix()}" for file in files}
    wanted = {name for name in sources if name.endswith((".py", ".json", ".jinja", ".typed"))}
    assert len(wanted) > 100 and wanted - packed == set()


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in OTHERS])
def test_command_output_is_the_same_from_wheel_and_clone(both, name):
    (_, installed), (_, clone) = both
    code, text, *_ = installed[name]
    assert code == (1 if name == "data check" else 0), installed[name]
    if name == "compile":
        kernels = [json.loads(said[name][1])["kernels"] for _, said in both]
        assert kernels[0]
        for row in kernels[0] + kernels[1]:
            del row["seconds"]
        assert kernels[0] == kernels[1] and json.loads(text)["violations"] == []
    else:
        assert text == clone[name][1]


def test_wheel_contains_gpu_verification_results(both):
    (_, installed), _ = both
    rows = {row["op"]: row for row in json.loads(installed["ops"][1])}
    result = json.loads((ROOT / "benchmarks" / "results" / "NVIDIA_H200.json").read_text())
    checked = result["parity"].keys() & rows.keys()  # an older results file also names deleted ops
    assert checked
    assert all(result["machine"] in " ".join(rows[op]["gpu"]) for op in checked)


def test_env_output_is_the_same_from_wheel_and_clone(both):
    facts = [[fact["name"] for fact in json.loads(said["env"][1])] for _, said in both]
    assert facts[0] == facts[1] and len(facts[0]) > 10


def test_benchmark_from_wheel_records_no_foreign_commit(both):
    results = []
    for folder, said in both:
        assert said["bench"][0] == 0, said["bench"]
        results.append(json.loads((folder / "bench.json").read_text()))
        rows = {(r["op"], r["shape"], r["provider"], r["status"]) for r in results[-1]["ops"]}
        assert rows == {(OP, "LLaVA-1.5-7B, 8 x 2944", "eager", "measured")}
    assert results[0]["sources"] == results[1]["sources"]
    assert results[0]["commit"] is None


def test_results_are_not_saved_into_installed_package(both):
    (_, installed), _ = both
    code, _, complaint, _ = installed["save"]
    assert code == main.Exit.USAGE and "clone of the repository" in " ".join(complaint.split())


def test_profile_is_written_from_wheel(both):
    for folder, said in both:
        assert said["profile"][0] == 0, said["profile"]
        written = {path.name for path in (folder / "vlm_fast_profile").iterdir()}
        assert {"profile.html", "profile.json", "profile.csv"} <= written
