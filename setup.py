"""What is compiled, none of it needed: vlm_fast._C, and on request the Hopper GEMMs.

VLM_FAST_CUTLASS=1 builds vlm_fast/_hopper.so (sm_90a): about a minute and 4 GB for each of its
kernels. It needs nvcc 12.3 or newer and CUTLASS's headers, from CUTLASS_PATH (a folder with
include/) or from the extra `cutlass`, and so no build isolation.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(Path("csrc").glob("*.cpp"))
HEADERS = sorted(set(Path("csrc").glob("*.h")) - set(Path("csrc").glob("hopper_*")))
COMPILER = os.environ.get("CXX", "g++")
HOPPER_SOURCES = sorted(Path("csrc").glob("hopper_*.cu"))
HOPPER_HEADERS = sorted(Path("csrc").glob("hopper_*.h"))
NVCC = os.environ.get("CUDACXX", "nvcc")


def why_pure_python() -> str | None:
    if os.environ.get("VLM_FAST_BUILD_EXT") == "0":
        return "VLM_FAST_BUILD_EXT=0"
    if sys.platform != "linux":
        return f"not tried on {sys.platform}"
    if shutil.which(shlex.split(COMPILER)[0]) is None:
        return f"no C++ compiler ({COMPILER}); set CXX to use another"
    return None


def why_no_hopper() -> str | None:
    """None, or why the Hopper GEMMs, which were asked for, cannot be built."""
    if sys.platform != "linux":
        return f"not tried on {sys.platform}"
    if shutil.which(shlex.split(NVCC)[0]) is None:
        return f"no CUDA compiler ({NVCC}); set CUDACXX to its path"
    if not (cutlass_include() / "cutlass" / "cutlass.h").is_file():
        return (
            "no CUTLASS headers: set CUTLASS_PATH, or pip install nvidia-cutlass==4.2.0.0 and "
            "build with --no-build-isolation"
        )
    return None


def cutlass_include() -> Path:
    if "CUTLASS_PATH" in os.environ:
        return Path(os.environ["CUTLASS_PATH"], "include").resolve()
    spec = importlib.util.find_spec("cutlass_library")
    return Path(spec.origin if spec and spec.origin else "missing").parent / "source" / "include"


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


def hopper_ninja_file(library: Path) -> str:
    """An object for every config that a source lists: each takes as long as all of _C's."""
    flags = (
        "-std=c++17 -O3 -DNDEBUG -gencode arch=compute_90a,code=sm_90a --expt-relaxed-constexpr "
        f"-Xcompiler -fPIC,-fvisibility=hidden -isystem {shlex.quote(str(cutlass_include()))}"
    )
    objects = {
        f"{source.stem}.{config}.o": (source, config)
        for source in HOPPER_SOURCES
        for config in re.findall(r"CONFIG == (\d+)", source.read_text())
    }
    headers = " ".join(map(ninja_path, HOPPER_HEADERS))
    lines = [
        "pool memory",
        f"  depth = {os.environ.get('MAX_JOBS', '2')}",
        "rule compile",
        f"  command = {NVCC} {flags} -DCONFIG=$config -c $in -o $out",
        "  pool = memory",
        "rule link",
        f"  command = {NVCC} -shared -cudart static $in -o $out",
    ]
    for name, (source, config) in objects.items():
        lines += [
            f"build {name}: compile {ninja_path(source)} | {headers}",
            f"  config = {config}",
        ]
    lines += [f"build {ninja_path(library)}: link {' '.join(objects)}"]
    return "\n".join(lines) + "\n"


def ninja_path(path: Path) -> str:
    return str(path.resolve()).replace(" ", "$ ")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            if ext.name == HOPPER:
                self.ninja("hopper", hopper_ninja_file(library))
            else:
                import pybind11

                include = [sysconfig.get_path("include"), pybind11.get_include()]
                self.ninja("native", ninja_file(library, include))
        except (ImportError, OSError) as error:
            # A library of older sources would be installed in its place.
            library.unlink(missing_ok=True)
            print(f"vlm_fast: building {ext.name} failed: {error}", file=sys.stderr)

    def ninja(self, folder_name: str, content: str) -> None:
        folder = Path(self.build_temp, folder_name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(content)
        if subprocess.run([sys.executable, "-m", "ninja", "-C", folder]).returncode != 0:
            raise OSError("ninja says why above")

    def get_ext_filename(self, fullname: str) -> str:
        # No Python in it, so none in its name.
        name = super().get_ext_filename(fullname)
        return re.sub(r"_hopper\..*", "_hopper.so", name)


HOPPER = "vlm_fast._hopper"
extensions = []
if (reason := why_pure_python()) is None:
    sources, headers = list(map(str, SOURCES)), list(map(str, HEADERS))
    extensions.append(Extension("vlm_fast._C", sources, depends=headers, optional=True))
else:
    print(f"vlm_fast: pure-Python install, {reason}", file=sys.stderr)
if os.environ.get("VLM_FAST_CUTLASS") == "1":
    if (reason := why_no_hopper()) is None:
        sources, headers = list(map(str, HOPPER_SOURCES)), list(map(str, HOPPER_HEADERS))
        extensions.append(Extension(HOPPER, sources, depends=headers, optional=True))
    else:
        print(f"vlm_fast: no Hopper GEMMs, {reason}", file=sys.stderr)
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
