"""What this machine has of what the ops can use, with the cause and a remedy of each lack."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import vlm_fast
from vlm_fast.kernels import _hopper, _native, _triton

PACKAGES = (
    "transformers", "accelerate", "peft", "pillow", "openai", "xformers", "liger-kernel", "numpy",
    "nvidia-ml-py",
)  # fmt: skip
SWITCHES = (
    "VLM_FAST_STRICT", "VLM_FAST_DISABLE", "VLM_FAST_BUILD_EXT", "VLM_FAST_CUTLASS",
    "TRITON_INTERPRET",
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One fact about the machine.

    Attributes:
        name: what was looked for.
        value: what was found.
        cause: why it is missing, or empty.
        remedy: what to do about it, or empty.
    """

    name: str
    value: str
    cause: str = ""
    remedy: str = ""


def facts() -> Iterator[Fact]:
    """Everything that decides how the ops run on this machine."""
    yield Fact("vlm_fast", vlm_fast.__version__)
    yield Fact("python", platform.python_version())
    yield Fact("platform", platform.platform())
    yield Fact("processor", processor())
    yield Fact("torch", f"{torch.__version__} ({torch.get_num_threads()} threads)")
    yield from _gpus()
    yield _triton_fact()
    if _triton.AVAILABLE and not _triton.INTERPRETED:
        yield _triton_cache()
        yield from _driver_library()
    yield _extension()
    yield _hopper_gemms()
    yield _compiler()
    for package in PACKAGES:
        version = version_of(package)
        yield Fact(package, version or "not installed (optional)")
    for name in SWITCHES:
        yield Fact(name, os.environ.get(name, "not set"))


def version_of(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> Iterator[Fact]:
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            cause = "this torch is built without CUDA"
            remedy = "install a CUDA build: https://pytorch.org/get-started/locally"
        elif not Path("/proc/driver/nvidia/version").exists():
            cause = "no NVIDIA driver is loaded"
            remedy = "install one, or give the container its GPUs (docker run --gpus all)"
        else:
            cause = "torch finds no usable device"
            remedy = "see nvidia-smi, and CUDA_VISIBLE_DEVICES"
        yield Fact("gpu", "none; the ops take their CPU path", cause, remedy)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Fact(
            f"gpu {index}",
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.multi_processor_count} multiprocessors",
        )
    yield Fact("cuda of torch", str(torch.version.cuda))
    yield driver()


def driver() -> Fact:
    """The version of the NVIDIA driver."""
    try:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        return Fact("driver", version.decode() if isinstance(version, bytes) else version)
    except Exception as error:  # any failure of NVML must not hide the other facts
        return Fact("driver", "unknown", f"NVML: {error}", "pip install nvidia-ml-py")


def _triton_fact() -> Fact:
    version = version_of("triton")
    if not _triton.AVAILABLE:
        if platform.system() != "Linux":
            return Fact("triton", "not importable", f"no builds for {platform.system()}", "none")
        return Fact("triton", "not importable", _import_error("triton"), "pip install triton")
    if _triton.INTERPRETED:
        return Fact(
            "triton", f"{version}, interpreted", "TRITON_INTERPRET=1: slow, for tests", "unset it"
        )
    return Fact("triton", f"{version}")


def _triton_cache() -> Fact:
    """Whether Triton's cache directory, by default in the home directory, is writable."""
    name, remedy = "triton cache", "set TRITON_CACHE_DIR to a directory that can be written"
    path = Path(str(importlib.import_module("triton.knobs").cache.dir))
    if "~" in path.parts[:1]:
        return Fact(name, f"{path}", "there is no home directory: HOME is not set", remedy)
    reason = why_not_writable(path)
    return Fact(name, f"{path}", reason, remedy) if reason else Fact(name, f"{path}")


def why_not_writable(folder: Path) -> str:
    """The reason why no file can be created in a folder or its nearest existing parent, or ""."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return f"{there} cannot be written: {error.strerror}"


def _driver_library() -> Iterator[Fact]:
    """Whether Triton finds libcuda, which it searches through ldconfig at the first launch."""
    if not torch.cuda.is_available():
        return
    name = "libcuda for Triton"
    try:
        found = importlib.import_module("triton.backends.nvidia.driver").libcuda_dirs()
    except (AssertionError, OSError, subprocess.CalledProcessError) as error:
        cause = f"{type(error).__name__}: {error}"
        remedy = "set TRITON_LIBCUDA_PATH to the folder of libcuda.so.1, or add /sbin to PATH"
        yield Fact(name, "not found", cause, remedy)
    else:
        yield Fact(name, ", ".join(found))


def _extension() -> Fact:
    if _native.native is not None:
        return Fact("compiled extension", "present")
    extension = "vlm_fast._C"
    # The error of the import says what is wrong.
    return Fact(
        "compiled extension", "absent; ATen serves the CPU", _import_error(extension),
        "with a C++ compiler: pip install --no-build-isolation . (without VLM_FAST_BUILD_EXT=0)",
    )  # fmt: skip


def _hopper_gemms() -> Fact:
    cause = _hopper.why_absent
    if cause is None:
        return Fact("Hopper GEMMs", "present; used from the number of rows where they are faster")
    return Fact(
        "Hopper GEMMs", "absent (optional); cuBLAS and a pass serve", cause,
        "with nvcc, for sm_90 alone: VLM_FAST_CUTLASS=1 pip install --no-build-isolation "
        "'.[cutlass]'",
    )  # fmt: skip


def _import_error(module: str) -> str:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return "was not importable when vlm_fast was imported"


def _compiler() -> Fact:
    """Whether there is a C compiler: Triton compiles a stub with it at its first launch."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc")), None)
    header = Path(sysconfig.get_path("include"), "Python.h")
    remedy = "apt-get install gcc python3-dev, or set CC"
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        return Fact("c compiler", "none", "Triton needs one at the first launch", remedy)
    if not header.exists():
        return Fact("c compiler", compiler, "Python.h is missing; Triton needs it", remedy)
    return Fact("c compiler", compiler)
