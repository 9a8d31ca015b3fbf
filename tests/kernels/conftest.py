"""The device that ``--device`` chooses, and repeats without the CPU's compiled code."""

import sys

import pytest


@pytest.fixture(scope="session")
def device(request):
    """The device of tensors. Triton's interpreter works on those of the CPU."""
    return "cuda" if request.config.getoption("device") == "cuda" else "cpu"


@pytest.fixture(params=["c", "python"])
def stub(request):
    """A driver that computes nothing, under each launcher."""
    from tests.support import stub_gpu

    with stub_gpu.active(request.param) as found:
        found.name = request.param
        yield found


def pytest_generate_tests(metafunc):
    """On a CPU, tests marked ``aten`` run again without the compiled code."""
    from vlm_fast.kernels._native import native

    on_cpu = metafunc.config.getoption("device") == "cpu" and native is not None
    if on_cpu and metafunc.definition.get_closest_marker("aten"):
        metafunc.fixturenames.append("code")
        metafunc.parametrize("code", ["compiled", "ATen"], indirect=True)


@pytest.fixture
def code(request, monkeypatch):
    if request.param == "ATen":
        for name, module in list(sys.modules.items()):
            if name.startswith("vlm_fast.kernels.") and hasattr(module, "native"):
                monkeypatch.setattr(module, "native", None)


def pytest_collection_modifyitems(config, items):
    """Deselect repeats for ops without compiled code, which would run the same ATen code twice."""
    repeats = [item for item in items if is_repeat(getattr(item, "callspec", None))]
    config.hook.pytest_deselected(items=repeats)
    gone = set(repeats)
    items[:] = [item for item in items if item not in gone]


def is_repeat(callspec):
    from tests.support.cases import has_compiled_code  # not before --device has been obeyed

    params = callspec.params if callspec else {}
    return params.get("code") == "ATen" and "op" in params and not has_compiled_code(params["op"])
