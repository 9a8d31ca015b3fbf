"""A GPU that computes nothing: Triton compiles kernels and launches them on a stub of the driver.

Tensors are the CPU's, so no result means anything. Launches are counted and their arguments kept.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

import vlm_fast
from vlm_fast.kernels import _fast_launch, _launcher
from vlm_fast.kernels._triton import triton

SOURCE = Path(__file__).with_name("stub_cuda") / "driver.c"
CPU = 1  # DLPack's number of the device
PACKAGE = str(Path(vlm_fast.__file__).parent)


def why_none():
    """None, or why this process cannot have a stub of the driver."""
    if torch.cuda.is_available():
        return "the driver of a real GPU is loaded"
    if shutil.which(os.environ.get("CC", "gcc")) is None:
        return "there is no C compiler"
    if not _launcher.AVAILABLE:
        return "Triton is not installed"
    return None


@functools.cache
def driver():
    """The stub, compiled and loaded as this process's libcuda.so.1."""
    folder = tempfile.mkdtemp(prefix="vlm_fast-stub-")
    library = Path(folder, "libcuda.so.1")
    compiler = os.environ.get("CC", "gcc")
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{library.name}"]
    subprocess.run([*command, "-o", library, SOURCE], check=True)
    Path(folder, "libcuda.so").symlink_to(library.name)
    os.environ["TRITON_LIBCUDA_PATH"] = folder  # where Triton's helper module is linked to
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    for name in ("stub_function", "stub_parameter"):
        getattr(loaded, name).restype = ctypes.c_ulonglong
    loaded.stub_config.restype = ctypes.c_uint
    if hasattr(triton.compiler.CompiledKernel, "__del__"):
        # It unloads a kernel through the active driver, which is not the stub any more when the
        # garbage collector runs.
        del triton.compiler.CompiledKernel.__del__
    return loaded


def fake_backend(device):
    """Triton's NVIDIA backend with constants where it would ask ``torch.cuda``."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class StubDriver(CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_stream = lambda device: 0
            self.get_current_device = lambda: device
            self.set_current_device = lambda device: None

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    return StubDriver()


@contextlib.contextmanager
def active(launcher="c"):
    """Run kernels on the stub, by this launcher: "c", "python" or "triton"."""
    from triton.runtime import driver as triton_driver

    stub = driver()
    before = triton_driver._active
    # The index of a CPU tensor's device is -1 for Python and 0 for DLPack.
    triton_driver.set_active(fake_backend(-1 if launcher == "python" else 0))
    forget_launchers()
    stub.stub_set_device(0)
    try:
        patch = mock.patch.dict(os.environ, VLM_FAST_LAUNCHER=launcher)
        with patch, mock.patch.object(_fast_launch, "CUDA", CPU):
            yield stub
    finally:
        triton_driver._active = before
        forget_launchers()
        for reset in (stub.stub_set_error, stub.stub_hold, stub.stub_watch):
            reset(0)


def forget_launchers():
    """Let every kernel begin with Triton's own launch again."""
    for kernel in _launcher.KERNELS.values():
        kernel.launch = kernel.launch_by_triton
        if hasattr(kernel.jit, "device_caches"):
            kernel.jit.device_caches.clear()


def serve_cpu_tensors(monkeypatch):
    """Let every op take its Triton path with tensors of the CPU."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vlm_fast.") and hasattr(module, "runs_triton"):
            monkeypatch.setattr(module, "runs_triton", lambda tensor: True)
        if name.startswith("vlm_fast.") and hasattr(module, "check_count"):
            monkeypatch.setattr(module, "check_count", lambda *given: None)  # reads elements


class HostWork(NamedTuple):
    """What the host does in a call: counts, which do not depend on the machine's speed."""

    frames: int
    aten: int
    allocations: int
    launches: int
    by_triton: int


def host_work(call):
    """What a repeated call does: Python frames, ATen calls, allocations of tensors, launches, and
    launches by Triton's own path.

    The first calls compile kernels and fill caches. Only frames of this package count: torch's vary
    with what ran before, such as settings of its logging.
    """
    for _ in range(3):
        call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    recorded = profile.profiler.kineto_results.events()
    allocations = sum(e.name() == "[memory]" and e.nbytes() > 0 for e in recorded)
    aten = sum(e.name.startswith("aten::") and not inside_aten(e) for e in profile.events())
    frames = by_triton = 0
    run = triton.runtime.jit.JITFunction.run.__code__

    def count(frame, event, argument):
        nonlocal frames, by_triton
        if event == "call":
            frames += frame.f_code.co_filename.startswith(PACKAGE)
            by_triton += frame.f_code is run

    launches = driver().stub_launches()
    sys.setprofile(count)
    threading.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return HostWork(frames, aten, allocations, driver().stub_launches() - launches, by_triton)


def inside_aten(event):
    """Whether ATen itself made this call."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
        if event.name.startswith("aten::"):
            return True
    return False
