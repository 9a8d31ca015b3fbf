"""The ``--device`` option, process-wide settings of the suite, and shared fixtures."""

import copy
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch._functorch.config

pytest.register_assert_rewrite(
    "tests.support.captioned_training",
    "tests.support.guard_bands",
    "tests.support.op_accuracy",
)

# Inductor's cache does not see what a custom op became: that of an earlier version is no use.
# The processes of one run share theirs.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _inductor_cache = tempfile.TemporaryDirectory(prefix="vlm_fast-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor_cache.name

# Results of registered ops that alias are an error: newer torch's default, but under CI alone.
if hasattr(torch._functorch.config, "error_on_custom_op_aliasing"):
    torch._functorch.config.error_on_custom_op_aliasing = True

# On a busy machine threads mostly wait for each other: 10x. Tests about threads ask for them, and
# OMP_NUM_THREADS asks for them in all tests.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# A processor without AVX-512 has no AMX either. Only so does plain PyTorch run in bf16 as it.
LEVELS = {"default": "SSE41", "avx2": "AVX2"}
if os.environ.get("ATEN_CPU_CAPABILITY") in LEVELS:
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", LEVELS[os.environ["ATEN_CPU_CAPABILITY"]])

KERNELS = Path(__file__).parent / "kernels"


# ---- the device ----


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "interpreter", "cuda"),
        default="cpu",
        help="cpu runs all tests; interpreter (Triton's) and cuda run those of tests/kernels "
        "that are marked for them",
    )


def pytest_configure(config):
    """Triton is either interpreted or compiled for the life of a process."""
    device = config.getoption("device")
    os.environ["VLM_FAST_TEST_DEVICE"] = device  # read by tests.support.cases at its import
    if device == "interpreter":
        if "triton" in sys.modules:
            raise pytest.UsageError("--device interpreter: Triton was imported already")
        os.environ["TRITON_INTERPRET"] = "1"
        from tests.support import address_bounds, interpreter_fixes

        interpreter_fixes.apply()
        address_bounds.enforce()
    elif os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1 is set: run tests with --device interpreter")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no CUDA device")


def pytest_ignore_collect(collection_path, config):
    """Only tests/kernels runs on devices other than the CPU."""
    if config.getoption("device") != "cpu":
        around = {KERNELS, *KERNELS.parents}
        return (collection_path not in around and KERNELS not in collection_path.parents) or None
    return None


def pytest_collection_modifyitems(config, items):
    others = [item for item in items if config.getoption("device") not in devices(item)]
    config.hook.pytest_deselected(items=others)
    gone = set(others)
    items[:] = [item for item in items if item not in gone]


def devices(item):
    """The devices that a test runs on."""
    marker = item.get_closest_marker("devices")
    return marker.args if marker else ("cpu",)


# ---- fixtures ----


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["shell", "background"])
def inherited_sigint(request):
    """SIGINT as a process begins with it: from a terminal, and in the background of a script."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    """The same random numbers for every test; no counts, warnings or switches from another."""
    from vlm_fast import fallback
    from vlm_fast.modules.parameter_access import dtypes

    torch.manual_seed(0)
    monkeypatch.setattr(dtypes, "_last_input", None)  # modules that wait for the garbage collector
    for switch in ("strict_switch", "disabled_switch"):
        monkeypatch.setattr(fallback.switches, switch, fallback.Switch())
    for record in ("fast_calls", "_fallbacks", "_warned"):
        empty = copy.copy(getattr(fallback, record))
        empty.clear()
        monkeypatch.setattr(fallback, record, empty)
