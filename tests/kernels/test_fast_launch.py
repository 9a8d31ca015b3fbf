"""Launchers of known kernels give the driver what Triton's own launch gives it."""

import gc
import threading
import time
import types

import pytest
import torch

from tests.support import stub_gpu
from tests.support.stub_kernels import (
    add_one,
    every_kind_of_argument,
    kernel_of,
    known,
    one_program,
)
from vlm_fast.kernels import _fast_launch, _host, _launcher
from vlm_fast.kernels._triton import triton

pytestmark = pytest.mark.skipif(stub_gpu.why_none() is not None, reason=str(stub_gpu.why_none()))


@pytest.fixture
def add(stub):
    """A kernel that has been launched once, so that its launcher knows it."""
    made = kernel_of(add_one, 16, 32)
    for _ in range(2):  # Triton compiles; then the launcher remembers
        made(one_program, torch.zeros(64), 64)
    assert known(made) == 1
    return made


def triton_launches(kernel, monkeypatch):
    """A list that grows with every launch by Triton itself."""
    calls, run = [], kernel.jit.run
    monkeypatch.setattr(kernel.jit, "run", lambda *a, **k: (calls.append(a), run(*a, **k))[1])
    return calls


def test_known_kernels_are_not_launched_by_triton(stub, add, monkeypatch):
    calls = triton_launches(add, monkeypatch)
    before = stub.stub_launches()
    for _ in range(5):
        add(one_program, torch.zeros(64), 64)
    assert stub.stub_launches() - before == 5 and not calls


def test_grid_without_programs_launches_nothing(stub, add):
    before = stub.stub_launches()
    add(lambda blocks: (4, 0), torch.zeros(64), 64)
    assert stub.stub_launches() == before


def test_error_of_the_driver_is_raised(stub, add):
    stub.stub_set_error(700)
    with pytest.raises(RuntimeError, match="an error of the stub"):
        add(one_program, torch.zeros(64), 64)


def test_error_of_the_grid_is_raised(stub, add):
    with pytest.raises(ZeroDivisionError):
        add(lambda blocks: (1 // 0,), torch.zeros(64), 64)


@pytest.mark.parametrize("setting", ["enter", "exit", "debug", "pre-run", "recording"])
def test_hooks_and_settings_of_triton_are_obeyed(stub, add, monkeypatch, setting):
    runtime, seen = triton.knobs.runtime, []
    calls = triton_launches(add, monkeypatch)

    def hook(*given, **named):
        seen.append(given)

    if setting == "debug":
        runtime.debug = True
    elif setting == "pre-run":
        add.jit.pre_run_hooks.append(hook)
    elif setting == "recording":
        with _launcher.recording() as seen:
            add(one_program, torch.zeros(64), 64)
    else:
        getattr(runtime, f"launch_{setting}_hook").add(hook)
    try:
        if setting != "recording":
            add(one_program, torch.zeros(64), 64)
    finally:
        for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
            chain.remove(hook)
        if hook in add.jit.pre_run_hooks:
            add.jit.pre_run_hooks.remove(hook)
        vars(runtime).pop("debug", None)
    assert len(calls) == 1 and (seen or setting == "debug")
    add(one_program, torch.zeros(64), 64)
    assert len(calls) == 1


def test_settings_that_were_restored_are_no_obstacle(stub, add, monkeypatch):
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    hook, calls = runtime.launch_enter_hook, triton_launches(add, monkeypatch)
    for knobs, name, value in (
        (runtime, "debug", False),
        (runtime, "launch_enter_hook", hook),
        (compilation, "listener", compilation.listener),
    ):
        monkeypatch.setitem(vars(knobs), name, value)
    add(one_program, torch.zeros(64), 64)
    assert not calls


@pytest.mark.parametrize("name", ["launch_enter_hook", "add_stages_inspection_hook"])
def test_hooks_that_were_assigned_are_obeyed(stub, add, monkeypatch, name):
    calls, seen = triton_launches(add, monkeypatch), []

    class Hook(type(triton.knobs.runtime.launch_enter_hook)):
        def __call__(self, *given, **named):
            seen.append(given)
            return "", ""

    monkeypatch.setitem(vars(triton.knobs.runtime), name, Hook())
    add(one_program, torch.zeros(64), 64)
    assert len(calls) == 1


def test_another_current_device_is_left_to_triton(stub, add, monkeypatch):
    calls = triton_launches(add, monkeypatch)
    if stub.name == "c":
        stub.stub_set_device(1)
    else:
        monkeypatch.setattr(add.launch, "current_device", lambda: 1)
    add(one_program, torch.zeros(64), 64)
    assert len(calls) == 1


@pytest.mark.parametrize("count", [2**62, True, 3.0])
def test_new_types_of_arguments_are_compiled_once(stub, add, monkeypatch, count):
    calls = triton_launches(add, monkeypatch)
    for _ in range(3):
        add(one_program, torch.zeros(64), count)
    assert len(calls) == 1


def test_subclasses_of_tensors_are_left_to_triton(stub, add, monkeypatch):
    class Named(torch.Tensor):
        pass

    calls = triton_launches(add, monkeypatch)
    add(one_program, torch.zeros(64).as_subclass(Named), 64)
    assert len(calls) == 1


def test_equal_texts_are_one_kernel(stub):
    kernel = kernel_of(every_kind_of_argument, 16)
    for _ in range(4):
        kernel(one_program, torch.zeros(64), None, 2, 3, 5, 0.5, True, "".join(["ge", "lu"]))
    assert known(kernel) == 1


def test_compiled_kernels_outlive_tritons_cache(stub, add):
    gc.collect()
    unloads, launches = stub.stub_unloads(), stub.stub_launches()
    add.jit.device_caches.clear()
    gc.collect()
    add(one_program, torch.zeros(64), 64)
    assert stub.stub_unloads() == unloads and stub.stub_launches() == launches + 1


def test_first_launches_of_threads_race(stub):
    kernel, errors = kernel_of(add_one, 16), []
    start = threading.Barrier(8)

    def run():
        try:
            start.wait()
            for _ in range(50):
                kernel(one_program, torch.zeros(64), 64)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    before = stub.stub_launches()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and stub.stub_launches() - before == 400 and known(kernel) == 1


def test_other_threads_run_during_a_launch(stub, add):
    launches = stub.stub_launches()

    def let_go():
        while stub.stub_launches() == launches:
            time.sleep(0.001)
        stub.stub_hold(0)

    stub.stub_hold(1)
    thread = threading.Thread(target=let_go, daemon=True)
    thread.start()
    add(one_program, torch.zeros(64), 64)  # with the lock of Python it would wait in vain
    assert not stub.stub_is_held()
    thread.join()


def jit_with(count, **attributes):
    parameter = types.SimpleNamespace(
        name="x", is_constexpr=False, do_not_specialize=False,
        do_not_specialize_on_alignment=False, annotation_type=None, **attributes,
    )  # fmt: skip
    return types.SimpleNamespace(params=[parameter] * count)


def test_more_arguments_than_the_table_holds_are_refused():
    assert len(_fast_launch.argument_flags(jit_with(128), set())) == 128
    assert _fast_launch.argument_flags(jit_with(129), set()) is None


def test_extension_refuses_more_arguments_than_it_holds(stub):
    module = _host.host.launching_on(stub_gpu.CPU)
    with pytest.raises(ValueError, match="at most 128 arguments"):
        module.Launcher(print, bytes(129), ({},), ())
    launcher = module.Launcher(print, bytes(128), ({},), ())
    with pytest.raises(TypeError, match="takes 128 arguments, got 1"):
        launcher(0, one_program, None)
    with pytest.raises(IndexError, match="no config 3"):
        launcher(3, one_program, *[None] * 128)


@pytest.fixture
def nothing_installed(monkeypatch):
    """No extension was built when the package was installed."""

    def absent():
        raise ImportError

    monkeypatch.setattr(_host, "installed", absent)


def test_triton_builds_the_extension_from_source(nothing_installed):
    stub_gpu.driver()
    host = _host.Host()
    assert host.module is None and host.describe is None
    assert host.launching_on(stub_gpu.CPU).__name__ == "_launch"
    assert host.describe((torch.zeros(2, 3), None)) == _host.host.describe((torch.ones(2, 3), None))


def test_python_launches_without_an_extension(nothing_installed, monkeypatch):
    monkeypatch.setattr(_host, "built_by_triton", _host.installed)
    with stub_gpu.active("python"):
        monkeypatch.setenv("VLM_FAST_LAUNCHER", "c")
        monkeypatch.setattr(_fast_launch, "host", _host.Host())
        kernel = kernel_of(add_one, 16)
        kernel(one_program, torch.zeros(64), 64)
        assert isinstance(kernel.launch, _fast_launch.PythonLauncher)


def test_unknown_launcher_is_named_and_ignored(monkeypatch):
    with stub_gpu.active("c"):
        monkeypatch.setenv("VLM_FAST_LAUNCHER", "fast")
        kernel = kernel_of(add_one, 16)
        with pytest.warns(UserWarning, match="VLM_FAST_LAUNCHER='fast' is not one of"):
            kernel(one_program, torch.zeros(64), 64)
        assert type(kernel.launch).__name__ == "Launcher"
