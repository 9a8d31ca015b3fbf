"""Three optional extension modules: vlm_fast._C for CPUs, vlm_fast._launch, which launches Triton
kernels, and vlm_fast._hopper for Hopper GPUs.

VLM_FAST_CUTLASS=1 builds vlm_fast._hopper (sm_90a): about a minute and 4 GB for each of its two
kernels. It needs nvcc 12.3 or newer and CUTLASS's headers, from CUTLASS_PATH (a folder with
include/) or from the extra `cutlass`, and so no build isolation.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HOPPER_FILES = sorted(Path("csrc").glob("hopper_*"))
LAUNCH_FILES = sorted(Path("csrc").glob("launch*"))
FILES = sorted(set(Path("csrc").iterdir()) - {*HOPPER_FILES, *LAUNCH_FILES})
COMPILER = os.environ.get("CXX", "g++")
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


def python_includes() -> list[str]:
    import pybind11

    return [sysconfig.get_path("include"), pybind11.get_include()]


def ninja_file(files: list[Path], library: Path, linker: str, *, openmp: str = "") -> str:
    """A build of one extension module: .c and .cpp files by the compiler, .cu files by nvcc."""
    host = f"-O3 -std=c++17 -fPIC -fvisibility=hidden {openmp}"
    includes = " ".join(f"-I{shlex.quote(path)}" for path in python_includes())
    device = (
        "-std=c++17 -O3 -DNDEBUG -gencode arch=compute_90a,code=sm_90a --expt-relaxed-constexpr "
        f"-Xcompiler -fPIC,-fvisibility=hidden -isystem {shlex.quote(str(cutlass_include()))}"
    )
    sources = [path for path in files if path.suffix in (".c", ".cpp", ".cu")]
    objects = " ".join(f"{path.stem}.o" for path in sources)
    lines = [
        "pool memory",
        f"  depth = {os.environ.get('MAX_JOBS', '2')}",
        "rule cpp",
        f"  command = {COMPILER} {host} {includes} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule c",
        f"  command = {COMPILER} -x c -O2 -fPIC -fvisibility=hidden {includes} -MMD -MF $out.d "
        "-c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cu",
        f"  command = {NVCC} {device} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  pool = memory",
        "rule link",
        f"  command = {linker} $in -o $out",
        *(f"build {s.stem}.o: {s.suffix[1:]} {ninja_path(s)}" for s in sources),
        f"build {ninja_path(library)}: link {objects}",
    ]
    return "\n".join(lines) + "\n"


def ninja_path(path: Path) -> str:
    return str(path.resolve()).replace(" ", "$ ")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        files = [Path(name) for name in (*ext.sources, *ext.depends)]
        try:
            if ext.name == HOPPER:
                content = ninja_file(files, library, f"{NVCC} -shared -cudart static")
            else:
                flag = openmp_flag()
                content = ninja_file(files, library, f"{COMPILER} -shared {flag}", openmp=flag)
            folder = Path(self.build_temp, ext.name).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "build.ninja").write_text(content)
            if subprocess.run([sys.executable, "-m", "ninja", "-C", folder]).returncode != 0:
                raise OSError("ninja says why above")
        except (ImportError, OSError) as error:
            # A library of older sources would be installed in its place.
            library.unlink(missing_ok=True)
            print(f"vlm_fast: building {ext.name} failed: {error}", file=sys.stderr)


def extension(name: str, files: list[Path]) -> Extension:
    headers = [str(path) for path in files if path.suffix == ".h"]
    return Extension(
        name, [str(path) for path in files if path.suffix != ".h"], depends=headers, optional=True
    )


HOPPER = "vlm_fast._hopper"
extensions = []
if (reason := why_pure_python()) is None:
    extensions.append(extension("vlm_fast._C", FILES))
    extensions.append(extension("vlm_fast._launch", LAUNCH_FILES))
else:
    print(f"vlm_fast: pure-Python install, {reason}", file=sys.stderr)
if os.environ.get("VLM_FAST_CUTLASS") == "1":
    if (reason := why_no_hopper()) is None:
        extensions.append(extension(HOPPER, HOPPER_FILES))
    else:
        print(f"vlm_fast: no Hopper GEMMs, {reason}", file=sys.stderr)
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
