"""Changes after the first call of a connector take effect in the next call.

Whether parameters are read directly is asked once and remembered. Each change is made to a
connector that has been called, and to a copy that has never run; both must give the same result.
"""

import copy
import functools
import io
import sys
import threading

import pytest
import torch
from torch import nn

import vlm_fast
from tests.support.connectors_of_every_kind import (
    CONNECTORS,
    assert_alike,
    call,
    called,
    fallbacks,
)
from tests.support.selection import slow_except
from vlm_fast.modules.parameter_access.remembered import Remembered

pytestmark = pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")
every_connector = pytest.mark.parametrize("name", CONNECTORS)
HAS_NORM = [name for name, connector in CONNECTORS.items() if connector.norm]

# ---- changes of classes, of the connector and of all modules ----


@every_connector
def test_forward_of_a_class_replaced(name, monkeypatch):
    fast, plain, given = called(name)
    for kind in (nn.Linear, nn.LayerNorm):
        right = kind.forward
        before = call(fast, given).detach()
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", lambda self, x, right=right: 1.5 * right(self, x))
            after = assert_alike(fast, plain, given)
            used = any(type(m) is kind for m in fast.modules())
            assert torch.allclose(before, after, rtol=1e-3, atol=1e-4) == (not used), kind
        torch.testing.assert_close(call(fast, given), before)


@every_connector
def test_forward_of_the_connector_replaced(name):
    fast, plain, given = called(name)
    for module in (fast, plain):
        forward = module.forward
        module.forward = lambda forward=forward, **given: forward(
            **{n: 1.5 * t if t.is_floating_point() else t for n, t in given.items()}
        )
    assert_alike(fast, plain, given)


@every_connector
def test_hooks_of_the_connector(name):
    """They are run by the call of the module; the connector stays fused."""
    fast, plain, given = called(name)
    before = call(fast, given).detach()
    fired = []
    for module in (fast, plain):
        module.register_forward_pre_hook(lambda *_: fired.append(1))
    with vlm_fast.strict():
        torch.testing.assert_close(call(fast, given), before)
    call(plain, given)
    assert len(fired) == 2


@every_connector
def test_global_hooks(name):
    fast, plain, given = called(name)
    kinds = (nn.Linear, nn.LayerNorm)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: 1.5 * y if isinstance(module, kinds) else None
    )
    try:
        assert_alike(fast, plain, given)
    finally:
        handle.remove()
    vlm_fast.stats(reset=True)
    with vlm_fast.strict():
        assert_alike(fast, plain, given)


@every_connector
def test_converted_to_float64(name):
    fast, plain, given = called(name)
    for module in (fast, plain):
        module.double()
    given = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    assert_alike(fast, plain, given)
    assert fallbacks()
    fast.float()
    call(fast, {n: t.float() if t.is_floating_point() else t for n, t in given.items()})
    assert not fallbacks()


@pytest.mark.parametrize("name", HAS_NORM)
def test_setting_of_a_norm_changed(name):
    fast, plain, given = called(name)
    before = call(fast, given).detach()
    for module in (fast, plain):
        norm = module.get_submodule(CONNECTORS[name].norm)
        setattr(norm, "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps", 0.5)
    with vlm_fast.strict():
        assert not torch.equal(assert_alike(fast, plain, given), before)


@every_connector
def test_training_mode(name):
    fast, plain, given = called(name)
    for module in (fast, plain):
        module.train()
        for dropout in (m for m in module.modules() if isinstance(m, nn.Dropout)):
            dropout.p = 0.0
        for attention in module.modules():
            if "attention_dropout" in vars(attention):
                attention.attention_dropout = 0.0
    with vlm_fast.strict():
        assert_alike(fast, plain, given)


# ---- copies, threads, compilation, sharding ----


@every_connector
def test_copies_have_answers_of_their_own(name):
    fast, plain, given = called(name)
    pickled = io.BytesIO()
    torch.save(fast, pickled)
    pickled.seek(0)
    copies = [copy.deepcopy(fast), torch.load(pickled, weights_only=False)]
    for module in copies:
        found = [v for m in module.modules() for v in vars(m).values()]
        assert not any(type(v) is Remembered for v in found)
        assert list(module.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for module in (*copies, plain):
            for parameter in module.parameters():
                parameter.mul_(1.5)
    before = call(fast, given).detach()
    with vlm_fast.strict():
        for module in copies:
            after = assert_alike(module, plain, given)
    assert not torch.equal(before, after) and torch.equal(call(fast, given), before)


@pytest.mark.parametrize("name", ["patched LLaVA", "MLPProjector", "SequentialProjector"])
def test_shallow_copy_reads_its_own_children(name):
    """A replica of nn.DataParallel is a shallow copy with other children."""
    fast, plain, given = called(name)
    replica = fast._replicate_for_data_parallel()
    replica._modules = dict(copy.deepcopy(fast)._modules)
    with torch.no_grad():
        for module in (replica, plain):
            for parameter in module.parameters():
                parameter.mul_(1.5)
    torch.testing.assert_close(call(replica, given), call(plain, given), rtol=1e-4, atol=1e-5)


@every_connector
def test_functional_call(name):
    fast, plain, given = called(name)
    before = call(fast, given).detach()
    other = {n: 1.5 * p.detach() for n, p in plain.named_parameters()}
    with vlm_fast.strict():
        ours = torch.func.functional_call(fast, other, args=(), kwargs=given)
    theirs = torch.func.functional_call(plain, other, args=(), kwargs=given)
    ours, theirs = (y[0] if isinstance(y, tuple) else y for y in (ours, theirs))
    ours, theirs = (getattr(y, "last_hidden_state", y) for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(call(fast, given), before)


@pytest.mark.parametrize("name", ["patched LLaVA", "patched Qwen2.5-VL", "QFormer"])
def test_two_threads(name):
    fast, plain, given = called(name)
    expected = call(plain, given).detach()
    wrong = []

    def run():
        for _ in range(20):
            if not torch.allclose(call(fast, given), expected, rtol=1e-4, atol=1e-5):
                wrong.append(1)
            for module in fast.modules():  # as after a change, so that both threads ask anew
                for key in [k for k, v in vars(module).items() if type(v) is Remembered]:
                    vars(module).pop(key, None)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


COMPILED = ["patched LLaVA", "patched Qwen2.5-VL", "QFormer", "PerceiverResampler"]


@pytest.mark.parametrize("name", slow_except(COMPILED[:2], COMPILED))
def test_compiled_after_an_eager_call(name):
    fast, plain, given = called(name)
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(call, fast), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(given), call(plain, given), rtol=1e-4, atol=1e-5)
    for module in (fast, plain):
        linear = module.get_submodule(CONNECTORS[name].linear)
        linear.weight = nn.Parameter(1.5 * linear.weight.detach())
    torch.testing.assert_close(compiled(given), call(plain, given), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(call(fast, given), call(plain, given), rtol=1e-4, atol=1e-5)


# ---- what a call asks ----

QUESTIONS = {
    "why_not_direct", "why_not_readable", "why_call_does_more", "why_not_original_code",
    "why_not_activation", "norm_parameters", "why_changed",
}  # fmt: skip
# Python frames of a call in the modules and patches of the package.
FRAMES = {"patched LLaVA": 7, "patched Qwen2.5-VL": 15, "MLPProjector": 6, "patched BLIP-2": 194}


def frames(module, given):
    """The functions that a call runs, with the path of their file."""
    seen = []

    def note(frame, event, argument):
        if event == "call":
            seen.append((frame.f_code.co_filename, frame.f_code.co_name))

    sys.setprofile(note)
    try:
        call(module, given)
    finally:
        sys.setprofile(None)
    return seen


@every_connector
def test_second_call_asks_nothing(name):
    fast, _, given = called(name)
    rooms = ("/vlm_fast/modules/", "/vlm_fast/patching/")
    seen = [f for path, f in frames(fast, given) if any(room in path for room in rooms)]
    assert not QUESTIONS & set(seen)
    assert len(seen) <= FRAMES.get(name, len(seen)), seen
