"""Shared fixtures, and guards against suites that test nothing."""

import copy
import os
import signal
import tempfile

import pytest
import torch
import torch._functorch.config

pytest.register_assert_rewrite(
    "tests.support.add_layer_norm_properties",
    "tests.support.captioned_training",
    "tests.support.dropout_properties",
    "tests.support.guard_bands",
    "tests.support.kernel_properties",
    "tests.support.tile_properties",
)

# Inductor's cache does not see what a custom op became: that of an earlier version is no use.
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

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Each has a process of its own: `python -m pytest tests/interpreted`, `python -m pytest tests/gpu`.
collect_ignore = ["interpreted", "gpu"]


def pytest_collection_modifyitems(config, items):
    repeats = [item for item in items if runs_twice(item)]
    config.hook.pytest_deselected(items=repeats)
    gone = set(repeats)
    items[:] = [item for item in items if item not in gone]
    for item in items:
        if any("empty parameter set" in mark.kwargs.get("reason", "") for mark in item.own_markers):
            raise pytest.UsageError(f"{item.nodeid} has nothing to run on")
        if INTERPRETED and item.path.parent.name != "interpreted":
            raise pytest.UsageError(f"{item.nodeid} needs a process without TRITON_INTERPRET")


def runs_twice(item):
    """Whether it is without the compiled code of an op that has none: the same test again."""
    from tests.support.cases import has_compiled_code
    from vlm_fast.kernels._native import native

    chosen = item.callspec.params if hasattr(item, "callspec") else {}
    op = chosen.get("op")
    without = chosen.get("device") == "ATen" and native is not None
    return without and op is not None and not has_compiled_code(op)


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

    torch.manual_seed(0)
    for switch in ("strict_switch", "disabled_switch"):
        monkeypatch.setattr(fallback.switches, switch, fallback.Switch())
    for record in ("_fast", "_fallbacks", "_warned"):
        empty = copy.copy(getattr(fallback, record))
        empty.clear()
        monkeypatch.setattr(fallback, record, empty)
