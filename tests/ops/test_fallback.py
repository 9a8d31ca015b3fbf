"""Fallback from the fast path to the reference: warnings, counts, strict mode and switches."""

import asyncio
import importlib.util
import itertools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import vlm_fast
from tests.support.cases import OPS, any_case, any_op, each
from vlm_fast.kernels import _launcher

UNSERVED = torch.float64


def unserved_calls():
    """Valid calls that the fast path does not support, with the expected reason."""
    for op in OPS.values():
        args, options = op.sample(op.usual_shape, UNSERVED)
        reason = op.why_not(*args, **options)
        if reason is not None:
            yield pytest.param(op, args, options, reason, id=op.name)


every_unserved_call = pytest.mark.parametrize("op, args, options, reason", list(unserved_calls()))


def assert_equal(ours, theirs):
    for one, other in zip(each(ours), each(theirs), strict=True):
        assert torch.equal(one, other)


@any_case
def test_fast_path_supports_test_shapes(op, shape):
    args, options = op.sample(shape)
    assert op.why_not(*args, **options) is None
    with vlm_fast.strict(), warnings.catch_warnings():
        warnings.simplefilter("error")
        result = op(*args, **options)
    assert_equal(result, op.fast(*args, **options))
    assert vlm_fast.stats() == {op.name: {"fast": 2, "fallback": {}}}


@every_unserved_call
def test_fallback_is_correct_counted_and_warned_once(op, args, options, reason):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [op(*args, **options) for _ in range(3)]
    for result in results:
        assert_equal(result, op.reference(*args, **options))
    assert vlm_fast.stats(reset=True) == {op.name: {"fast": 0, "fallback": {reason: 3}}}
    assert vlm_fast.stats() == {}
    (warning,) = caught
    assert warning.category is vlm_fast.VlmFastFallbackWarning
    assert op.name in str(warning.message) and reason in str(warning.message)
    assert warning.filename == __file__, "the warning should point at the caller"


@every_unserved_call
def test_strict_raises_with_the_reason(op, args, options, reason):
    with vlm_fast.strict(), pytest.raises(vlm_fast.VlmFastFallbackError) as error:
        op(*args, **options)
    assert op.name in str(error.value) and reason in str(error.value)
    with pytest.warns(vlm_fast.VlmFastFallbackWarning):
        op(*args, **options)


@every_unserved_call
def test_fast_never_falls_back(op, args, options, reason):
    with pytest.raises(RuntimeError) as error:
        op.fast(*args, **options)
    assert op.name in str(error.value) and reason in str(error.value)


@any_op
def test_disabled_uses_the_reference_without_warning(op, monkeypatch):
    args, options = op.sample(op.usual_shape)
    called = []
    reference = op.reference
    monkeypatch.setattr(op, "reference", lambda *a, **k: called.append(op) or reference(*a, **k))
    with vlm_fast.disabled(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with vlm_fast.strict():  # disabled by the user, so this is not a fallback
            op(*args, **options)
        assert called and op.why_not(*args, **options) is not None
        op.fast(*args, **options)
    assert called == [op]
    op(*args, **options)
    assert called == [op] and op.why_not(*args, **options) is None


@any_op
def test_reference_never_takes_the_fast_path(op, monkeypatch):
    monkeypatch.setattr(op._path, "forward", lambda *a, **k: pytest.fail("the fast path ran"))
    args, options = op.sample(op.usual_shape)
    op.reference(*args, **options)
    with vlm_fast.disabled():
        op(*args, **options)


def test_context_managers_nest_and_survive_errors():
    state = vlm_fast.fallback.switches
    for manager, name in ((vlm_fast.strict, "strict"), (vlm_fast.disabled, "disabled")):
        with pytest.raises(KeyError), manager():
            with manager():
                assert getattr(state, name)
            assert getattr(state, name)
            raise KeyError
        assert not getattr(state, name)


@pytest.mark.parametrize(
    "value, strict", [("1", True), ("on", True), ("0", False), ("", False), ("maybe", False)]
)
def test_environment_variables(monkeypatch, value, strict):
    monkeypatch.setenv("VLM_FAST_STRICT", value)
    monkeypatch.setenv("VLM_FAST_DISABLE", value)
    # A second copy of the module, since the switches are read at import.
    spec = importlib.util.spec_from_file_location("fallback", vlm_fast.fallback.__file__)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spec.loader.exec_module(module)
    assert (module.switches.strict, module.switches.disabled) == (strict, strict)
    assert len(caught) == (2 if value == "maybe" else 0)


def switches():
    """Every global switch: a context manager that sets it, and a function that reads it."""
    state = vlm_fast.fallback.switches
    return {
        "strict": (vlm_fast.strict, lambda: state.strict),
        "disabled": (vlm_fast.disabled, lambda: state.disabled),
        "recording": (_launcher.recording, lambda: bool(_launcher._recordings)),
    }


@pytest.mark.parametrize("name", switches())
def test_switch_ends_when_all_contexts_exit_in_any_order(name):
    hold, is_on = switches()[name]
    for order in itertools.permutations(range(3)):
        held = [hold() for _ in range(3)]
        for manager in held:
            manager.__enter__()
        for place, index in enumerate(order):
            assert is_on()
            held[index].__exit__(None, None, None)
            assert is_on() == (place < 2)


@pytest.mark.parametrize("name", switches())
def test_switches_end_across_threads_and_tasks(name):
    hold, is_on = switches()[name]
    inside, left = threading.Event(), threading.Event()

    def stays():
        with hold():
            inside.set()
            assert left.wait(60)
            return is_on()

    async def interleaved():
        async def task(delay):
            with hold():
                for _ in range(delay):
                    await asyncio.sleep(0)
                assert is_on()

        await asyncio.gather(task(1), task(5), task(2))

    with ThreadPoolExecutor(1) as pool:
        with hold():
            found = pool.submit(stays)
            assert inside.wait(60)
        left.set()
        assert found.result() and not is_on()
    asyncio.run(interleaved())
    assert not is_on()


def test_overlapping_recordings_end_independently():
    one, other = _launcher.recording(), _launcher.recording()
    first, second = one.__enter__(), other.__enter__()
    assert first is not second
    one.__exit__(None, None, None)
    assert list(_launcher._recordings.values()) == [second]
    other.__exit__(None, None, None)


def test_compiled_code_follows_switches():
    op = OPS["max_similarity"]
    args, _ = op.sample(op.usual_shape)
    graphs = []

    def keep(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    outside = torch.compile(lambda *a: op(*a), backend=keep, fullgraph=True)

    def within(*a):
        with vlm_fast.disabled():
            return op(*a)

    for _ in range(2):
        outside(*args)
        with vlm_fast.disabled():
            outside(*args)
            with vlm_fast.disabled(), vlm_fast.strict():
                outside(*args)
    torch.compile(within, backend=keep, fullgraph=True)(*args)
    assert not vlm_fast.fallback.switches.disabled
    plain = [torch.matmul in targets for targets in graphs]
    assert plain == [False, True, True], graphs
