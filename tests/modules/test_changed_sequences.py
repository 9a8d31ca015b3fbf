"""Sequences of modules that change after their first call: children, modes and repeated changes."""

import copy

import pytest
import torch
from torch import nn

import vlm_fast
from tests.support.connectors_of_every_kind import call, called, fallbacks
from vlm_fast.modules import MLPProjector
from vlm_fast.modules.parameter_access import guard
from vlm_fast.modules.parameter_access.remembered import MAX_CHANGES

pytestmark = pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")


def test_dropout_becomes_active():
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 4)).eval()
    vlm_fast.patch(module, strict=True)
    x = torch.ones(64, 4)
    with vlm_fast.strict():
        assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x)) and fallbacks() == ["2: it drops values (p=0.5)"]
    module[2].p = 0.0
    with vlm_fast.strict():
        assert torch.equal(module(x), module(x))


def test_sequential_gets_other_children():
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).eval()
    plain = copy.deepcopy(module)
    vlm_fast.patch(module, strict=True)
    x = torch.randn(3, 4)
    with vlm_fast.strict():
        torch.testing.assert_close(module(x), plain(x))
        for m in (module, plain):
            m.append(nn.Tanh())
        torch.testing.assert_close(module(x), plain(x))
        for m in (module, plain):
            m[1] = nn.SiLU()
        torch.testing.assert_close(module(x), plain(x))
        for m in (module, plain):
            m._modules["1"], m._modules["3"] = m._modules["3"], m._modules["1"]
    torch.testing.assert_close(module(x), plain(x))


@pytest.mark.parametrize("name", ["patched LLaVA", "MLPProjector", "PatchMerger", "QFormer"])
def test_change_before_every_call(name, monkeypatch):
    """Guards are no longer made for a module whose parameters are replaced before every call."""
    fast, plain, given = called(name)
    made = []
    compiled = guard.Guard.compiled
    monkeypatch.setattr(guard.Guard, "compiled", lambda self: made.append(1) or compiled(self))
    for _ in range(MAX_CHANGES + 4):
        before = len(made)
        with torch.no_grad():
            for module in (fast, plain):
                for child in module.modules():
                    if type(child) is nn.Linear:
                        child.weight = nn.Parameter(0.9 * child.weight)
        with vlm_fast.strict():
            torch.testing.assert_close(call(fast, given), call(plain, given), rtol=1e-4, atol=1e-5)
    assert made and len(made) == before


def test_answers_are_remembered_again_after_few_changes():
    projector, x = MLPProjector(4, 8), torch.randn(3, 4)
    for _ in range(3 * MAX_CHANGES):
        projector.linear_1.weight = nn.Parameter(projector.linear_1.weight.detach())
        for _ in range(2):
            y = projector(x)
    stored = [v for v in vars(projector).values() if hasattr(v, "holds")]
    assert len(stored) == 1 and stored[0].holds() and stored[0].changes == 0
    torch.testing.assert_close(projector(x), y)
