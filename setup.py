"""The optional compiled extension vlm_fast._C; everything else is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(Path("csrc").glob("*.cpp"))
HEADERS = sorted(Path("csrc").glob("*.h"))
COMPILER = os.environ.get("CXX", "g++")


def why_pure_python() -> str | None:
    if os.environ.get("VLM_FAST_BUILD_EXT") == "0":
        return "VLM_FAST_BUILD_EXT=0"
    if sys.platform != "linux":
        return f"not tried on {sys.platform}"
    if shutil.which(shlex.split(COMPILER)[0]) is None:
        return f"no C++ compiler ({COMPILER}); set CXX to use another"
    return None


def openmp_flag() -> str:
    probe = [*shlex.split(COMPILER), "-fopenmp", "-shared", "-x", "c++", os.devnull]
    result = subprocess.run([*probe, "-o", os.devnull], capture_output=True)
    return "-fopenmp" if result.returncode == 0 else ""


def ninja_file(library: Path, include: list[str]) -> str:
    flags = f"-O3 -std=c++17 -fPIC -fvisibility=hidden {openmp_flag()}"
    includes = " ".join(f"-I{shlex.quote(path)}" for path in include)
    lines = [
        "rule compile",
        f"  command = {COMPILER} {flags} {includes} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {COMPILER} -shared {flags} $in -o $out",
        *(f"build {path.stem}.o: compile {ninja_path(path)}" for path in SOURCES),
        f"build {ninja_path(library)}: link {' '.join(f'{path.stem}.o' for path in SOURCES)}",
    ]
    return "\n".join(lines) + "\n"


def ninja_path(path: Path) -> str:
    return str(path.resolve()).replace(" ", "$ ")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        try:
            import pybind11

            folder.mkdir(parents=True, exist_ok=True)
            include = [sysconfig.get_path("include"), pybind11.get_include()]
            (folder / "build.ninja").write_text(ninja_file(library, include))
            if subprocess.run([sys.executable, "-m", "ninja", "-C", folder]).returncode != 0:
                raise OSError("ninja says why above")
        except (ImportError, OSError) as error:
            # A library of older sources would be installed in its place.
            library.unlink(missing_ok=True)
            print(f"vlm_fast: pure-Python install, building _C failed: {error}", file=sys.stderr)


reason = why_pure_python()
if reason:
    print(f"vlm_fast: pure-Python install, {reason}", file=sys.stderr)
    setup()
else:
    extension = Extension(
        "vlm_fast._C", list(map(str, SOURCES)), depends=list(map(str, HEADERS)), optional=True
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": NinjaBuild})
