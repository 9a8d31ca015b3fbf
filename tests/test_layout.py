"""The layout of the repository: import directions, packages, file lengths and docstrings."""

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlm_fast.training
from tests.support.cases import OPS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vlm_fast"
# A folder may import those after it, itself, and the top-level files of the package.
ORDER = (
    "cli", "advisor", "training", "devtools", "verification", "patching", "modules", "ops",
    "kernels",
)  # fmt: skip
LOOSE = {
    "__init__.py", "atomic_write.py", "fallback.py", "py.typed", "signals.py", "terminal.py",
}  # fmt: skip
LINKED = ("benchmarks", "csrc", "kernels")  # top-level folders that are installed under the package
# Lines of a file, by room. Files that are longer are listed with their length, which may only fall.
LONGEST = {
    "vlm_fast": 220, "vlm_fast/ops": 160, "vlm_fast/modules": 160, "vlm_fast/patching": 160,
    "kernels": 220, "csrc": 220, "benchmarks": 250, "tests": 280, "examples": 80,
}  # fmt: skip
LONGER = json.loads((ROOT / "tests" / "long_files.json").read_text())
SOURCES = sorted(
    path
    for folder in ("vlm_fast", *LINKED, "tests", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".c", ".cpp", ".h", ".cu")
)


def imports(path):
    """Absolute names of the modules that a file imports, at the top or inside functions."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*parents, *(node.module.split(".") if node.module else ())))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ORDER)
def test_imports_point_one_way(room):
    before = {f"vlm_fast.{name}" for name in ORDER[: ORDER.index(room)]}
    before |= {"vlm_fast.benchmarks"} if room != "cli" else set()
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        upward = [n for n in imports(path) if ".".join(n.split(".")[:2]) in before]
        assert not upward, path


@pytest.mark.parametrize("room", ["patching", "modules"])
def test_modules_and_patches_reach_kernels_through_ops(room):
    for path in sorted((PACKAGE / room).rglob("*.py")):
        assert not any(n.startswith("vlm_fast.kernels") for n in imports(path)), path


def test_top_level_files_import_no_package_folder():
    rooms = {f"vlm_fast.{name}" for name in ORDER}
    for name in LOOSE - {"__init__.py", "py.typed"}:
        assert not rooms & {".".join(n.split(".")[:2]) for n in imports(PACKAGE / name)}, name


def test_top_level_files_are_the_listed_ones():
    found = {p.name for p in PACKAGE.iterdir() if p.is_file() and p.suffix != ".so"}
    assert found == LOOSE and len(found) <= 6


def test_kernels_import_only_torch_triton_and_each_other():
    files = sorted((ROOT / "kernels").glob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            top = name.split(".")[0]
            known = {"torch", "triton", "kernels", "_C", *sys.stdlib_module_names}
            assert not top or top in known, f"{path.name} imports {name}"


def test_kernels_folder_is_not_a_package():
    """An installed package of the same name, which transformers imports, must win over it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("folder", LINKED)
def test_mapped_folders_are_linked_into_the_package(folder):
    assert (PACKAGE / folder).is_symlink() and (PACKAGE / folder).resolve() == ROOT / folder


def test_declared_packages_match_folders():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {p.parent.relative_to(ROOT) for p in PACKAGE.rglob("*.py")}
    for linked in LINKED:
        inside = {p.parent for p in (ROOT / linked).rglob("*.py")} | {ROOT / linked}
        folders |= {"vlm_fast" / folder.relative_to(ROOT) for folder in inside}
    declared = project["tool"]["setuptools"]["packages"]
    assert sorted(declared) == sorted({".".join(folder.parts) for folder in folders})
    assert project["tool"]["setuptools"]["package-dir"] == {f"vlm_fast.{n}": n for n in LINKED}
    assert project["project"]["version"] == vlm_fast.__version__


def longest(name):
    """The limit of the innermost room that a file is in."""
    return LONGEST[max((room for room in LONGEST if name.startswith(f"{room}/")), key=len)]


def test_files_stay_short():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in SOURCES}
    longer = {name: lines for name, lines in lengths.items() if lines > longest(name)}
    assert longer.keys() <= LONGER.keys(), "shorten them, or split them by meaning"
    grown = {name: lines for name, lines in longer.items() if lines > LONGER[name]}
    assert not grown, "files in tests/long_files.json may only become shorter"
    assert longer == LONGER, "write their new lengths to tests/long_files.json"


def test_ops_have_a_kernel_file_or_need_none():
    assert {op.__module__.rsplit(".", 1)[0] for op in OPS.values()} == {"vlm_fast.ops"}
    for op in OPS.values():
        assert (PACKAGE / "ops" / f"{op.__module__.rsplit('.', 1)[1]}.py").exists()


def public_names():
    for module in (
        vlm_fast, vlm_fast.training.data, vlm_fast.training.losses, vlm_fast.modules, vlm_fast.ops,
        vlm_fast.training.recipes,
    ):  # fmt: skip
        for name, value in vars(module).items():
            if not name.startswith("_") and not inspect.ismodule(value) and callable(value):
                yield f"{module.__name__}.{name}", value


@pytest.mark.parametrize("name, value", [pytest.param(*p, id=p[0]) for p in public_names()])
def test_public_functions_and_classes_have_docstrings(name, value):
    own = vars(value).get("__doc__")  # not inherited from a base class
    own = value.__doc__ if inspect.isfunction(value) else own
    assert own and len(own.split()) >= 4, name
    if name.startswith("vlm_fast.ops."):
        for argument in (*value.tensors, *value.defaults):
            assert argument in own, f"{name}: {argument} is not explained"


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


EVERYTHING = """
import importlib, pkgutil, sys
import vlm_fast.training
for module in pkgutil.walk_packages(vlm_fast.__path__, "vlm_fast."):
    if not module.name.endswith(("._C", "._hopper", "._launch")):  # libraries
        importlib.import_module(module.name)
"""


def test_import_loads_no_transformers_and_touches_no_device():
    found = run(
        "import sys, vlm_fast\n"
        "assert not any(name.startswith('vlm_fast.training') for name in sys.modules)\n"
        + EVERYTHING
        + "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'transformers', 'peft', 'accelerate', 'deepspeed', 'matplotlib', 'openai'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "driver = sys.modules.get('triton.runtime.driver')\n"
        "assert driver is None or driver.driver._active is None\n"
    )
    assert found.returncode == 0, found.stderr


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in {blocked}):
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocked())
"""

WORKS = """
import torch
import vlm_fast.training
from vlm_fast.verification import tolerance
from vlm_fast.ops.declaration import OPS
from vlm_fast.kernels import _native, _triton
for op in OPS.values():
    for shape in op.test_shapes:
        torch.manual_seed(2)
        args, options = op.sample(shape)
        with vlm_fast.strict():
            op(*args, **options)
        assert all(v.ok for v in tolerance.check(op, args, options))
        with vlm_fast.disabled():
            op(*args, **options)
print(len(OPS), _triton.AVAILABLE, _native.native is not None)
"""


@pytest.mark.parametrize(
    "blocked",
    [["triton"], ["vlm_fast._C"], ["vlm_fast._launch"], ["triton", "vlm_fast._C"]],
    ids="+".join,
)
def test_cpu_path_without_module(blocked):
    found = run(BLOCKED.format(blocked=blocked) + WORKS + EVERYTHING)
    assert found.returncode == 0, found.stderr
    count, triton, native = found.stdout.split()
    assert int(count) == len(OPS)
    assert not ("triton" in blocked and triton == "True")
    assert not ("vlm_fast._C" in blocked and native == "True")
