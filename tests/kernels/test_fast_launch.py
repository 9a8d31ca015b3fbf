"""Launchers of known kernels give the driver what Triton's own launch gives it."""

import gc
import random
import threading
import time
import types

import pytest
import torch

from tests.support import stub_gpu
from vlm_fast.kernels import _fast_launch, _host, _launcher
from vlm_fast.kernels._launcher import Config, Kernel
from vlm_fast.kernels._triton import tl, triton

pytestmark = pytest.mark.skipif(stub_gpu.why_none() is not None, reason=str(stub_gpu.why_none()))

INTEGERS = (0, 1, 2, 15, 16, 17, 32, 2**31 - 1, 2**31, 2**33, -16, -1, 2**31 - 16, -(2**31))
TEXTS = ("gelu", "silu", "gelu_tanh")


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["q"])
def every_kind_of_argument(x, y, n, m, q, f, flag, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if y is not None:
        tl.store(x + i, tl.load(y + i) * f + n + m + q + flag)
    elif KIND == "gelu":
        tl.store(x + i, f)


@triton.jit
def add_one(x, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < count) + 1, mask=i < count)


def kernel_of(jit, *sizes):
    made = Kernel(jit, tuple(Config({"BLOCK": size}) for size in sizes), choose=lambda size: size)
    made.jit.device_caches.clear()
    del _launcher.KERNELS[made.name]
    return made


@pytest.fixture(params=["c", "python"])
def stub(request):
    with stub_gpu.active(request.param) as found:
        found.name = request.param
        yield found


@pytest.fixture
def add(stub):
    """A kernel that has been launched once, so that its launcher knows it."""
    made = kernel_of(add_one, 16, 32)
    for _ in range(2):  # Triton compiles; then the launcher remembers
        made(one_program, torch.zeros(64), 64)
    assert known(made) == 1
    return made


def one_program(blocks):
    return (1,)


def known(kernel):
    """How many compiled kernels a launcher knows."""
    if isinstance(kernel.launch, _fast_launch.PythonLauncher):
        tables = {id(kernels): len(kernels) for _, kernels in kernel.launch.known.values()}
        return sum(tables.values())
    return kernel.launch.counts()[2]


def triton_launches(kernel, monkeypatch):
    """A list that grows with every launch by Triton itself."""
    calls, run = [], kernel.jit.run
    monkeypatch.setattr(kernel.jit, "run", lambda *a, **k: (calls.append(a), run(*a, **k))[1])
    return calls


def random_arguments(rng, tensors):
    wide = rng.choice(INTEGERS)
    return (
        rng.choice(tensors), rng.choice([*tensors, None]), rng.choice(INTEGERS), wide,
        rng.choice(INTEGERS), rng.choice([1.0, 0.5]), rng.choice([True, False]),
        "".join(rng.choice(TEXTS)),
    )  # fmt: skip


WIDTHS = {"i32": 32, "fp32": 32, "i1": 1, "u1": 1}


def given_by(stub, kinds, launch):
    """What a launch gives the driver: function, sizes, and parameters as far as they are wide."""
    stub.stub_watch(len(kinds))
    launch()
    stub.stub_watch(0)
    parameters = [stub.stub_parameter(i) % 2 ** WIDTHS.get(k, 64) for i, k in enumerate(kinds)]
    return stub.stub_function(), [stub.stub_config(i) for i in range(7)], parameters


def tensors_of_three_dtypes():
    """Tensors at addresses that are divisible by 16, and not."""
    whole = [torch.zeros(64, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float16)]
    return [torch.nn.Parameter(whole[0]), *whole, *[t[1:] for t in whole], *[t[8:] for t in whole]]


def specialisation(kernel, config, arguments):
    """What distinguishes compiled kernels for Triton, as text."""
    jit = kernel.jit
    binder = jit.device_caches[triton.runtime.driver.active.get_current_device()][4]
    _, found, options = binder(*arguments, **kernel.configs[config].options)
    return f"{found} {options}"


def test_key_is_tritons_specialisation(stub):
    kernel, rng = kernel_of(every_kind_of_argument, 16, 32), random.Random(0)
    tensors, ours, tritons = tensors_of_three_dtypes(), {}, {}
    launcher = _fast_launch.make_launcher(print, kernel.jit, ({"BLOCK": 16}, {"BLOCK": 32}), {})
    for _ in range(6000):
        config, arguments = rng.randrange(2), random_arguments(rng, tensors)
        key = launcher.key(config, *arguments)
        wanted = specialisation(kernel, config, arguments)
        assert ours.setdefault(key, wanted) == wanted, (arguments, key)
        assert tritons.setdefault(wanted, key) == key, (arguments, wanted)
    assert len(ours) > 2000 and None not in ours


def test_launcher_gives_the_driver_what_triton_gives(stub):
    kernel, rng = kernel_of(every_kind_of_argument, 16, 32), random.Random(1)
    tensors = tensors_of_three_dtypes()
    for _ in range(12):
        config, arguments = rng.randrange(2), random_arguments(rng, tensors)
        options = kernel.configs[config].options

        def by_triton():
            return kernel.jit[(3, 2)](*arguments, **options)  # noqa: B023

        def by_launcher():
            kernel(lambda blocks: (3, 2), *arguments, size=config)  # noqa: B023

        kinds = [kind for kind in by_triton().src.signature.values() if kind != "constexpr"]
        wanted = given_by(stub, kinds, by_triton)
        by_launcher()
        by_launcher()
        assert given_by(stub, kinds, by_launcher) == wanted, (arguments, kinds)
    assert known(kernel) == len(kernel.jit.device_caches.popitem()[1][0])


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
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    stub.stub_set_busy(300_000_000)
    begin = time.monotonic()
    add(one_program, torch.zeros(64), 64)
    end = time.monotonic()
    stop.set()
    thread.join()
    assert any(begin + 0.05 < at < end - 0.05 for at in ticks)


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
