"""DeepSpeed's ZeRO-3: connectors are fused as leaf modules, and fall back otherwise.

Its conventions are tested without DeepSpeed: ``ds_id`` and ``ds_status`` of a parameter, and the
function that marks leaf modules. If DeepSpeed is installed, it runs on two ranks
(``DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed`` does for that).
"""

import importlib.util
import os
import sys
from enum import Enum
from types import ModuleType

import pytest
import torch
from torch import nn

import vlm_fast
from tests.support.distributed_helpers import on_ranks
from tests.support.sharding_strategies import batch_row
from tests.support.small_connectors import CONNECTORS, WithHead
from tests.support.tiny_models import build
from tests.support.whole_models import FAMILIES, every_family, pair
from tests.support.zero3_models import BATCHES, BOTH, batch_of, plain_and_patched
from vlm_fast.modules import MLPProjector

INSTALLED = importlib.util.find_spec("deepspeed") is not None
Status = Enum("Status", ["NOT_AVAILABLE", "INFLIGHT", "AVAILABLE"])


@pytest.fixture
def leaves(monkeypatch):
    """The modules that a fake of DeepSpeed's function marked as leaves."""
    marked = []

    def set_z3_leaf_modules(model, classes):
        assert all(isinstance(kind, type) for kind in classes)
        marked.extend(n for n, m in model.named_modules() if isinstance(m, tuple(classes)))

    package, inner = ModuleType("deepspeed"), ModuleType("deepspeed.utils")
    inner.set_z3_leaf_modules = set_z3_leaf_modules
    monkeypatch.setitem(sys.modules, "deepspeed", package)
    monkeypatch.setitem(sys.modules, "deepspeed.utils", inner)
    return marked


@every_family
def test_connectors_become_leaf_modules(family, leaves):
    _, fast, _ = pair(family)
    names = vlm_fast.prepare_zero3(fast)
    assert tuple(names) == tuple(leaves) == FAMILIES[family].connectors
    assert names == [name for name, _ in vlm_fast.connectors(fast)]


@pytest.mark.parametrize("kind", CONNECTORS)
def test_vlm_fast_modules_become_leaf_modules(kind, leaves):
    assert vlm_fast.prepare_zero3(WithHead(CONNECTORS[kind][0]())) == ["connector"] == leaves


def test_connector_inputs_require_grad_behind_a_frozen_tower(leaves):
    connector, seen = MLPProjector(3, 4), []
    vlm_fast.prepare_zero3(connector)
    connector.register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    x = torch.randn(2, 3)
    connector(x)
    with torch.no_grad():
        connector(x)
    assert seen == [True, False] and not x.requires_grad


def test_second_call_in_one_forward_raises(leaves):
    """DeepSpeed would fail in backward without an explanation."""
    model, given = build("qwen3_vl")
    vlm_fast.patch(model)
    vlm_fast.prepare_zero3(model)
    with pytest.raises(RuntimeError, match="PatchMerger is called twice in one"):
        model(**given)
    with torch.no_grad():
        model(**given)
    for kinds in (["picture"], ["video"], []):
        model(**batch_of("qwen3_vl", kinds)).loss.backward()
    merger = model.model.visual.merger
    for _ in range(2):  # several separate calls are allowed
        merger(torch.randn(4, 48)).sum().backward()


def test_invalid_arguments_raise(leaves, monkeypatch):
    with pytest.raises(ValueError, match="model is a Linear without a connector; patch it first"):
        vlm_fast.prepare_zero3(nn.Linear(2, 2))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", None)
    with pytest.raises(ModuleNotFoundError, match=r"DeepSpeed 0\.13 or newer"):
        vlm_fast.prepare_zero3(MLPProjector(3, 4))


@pytest.mark.parametrize("kind", CONNECTORS)
def test_only_gathered_parameters_are_read(kind):
    make, given = CONNECTORS[kind]
    connector, inputs = make(), given(2)
    connector(*inputs)  # searched once and cached
    parameters = list(connector.parameters())
    for status, gathered in ((Status.AVAILABLE, True), (Status.NOT_AVAILABLE, False)):
        for i, parameter in enumerate(parameters):
            parameter.ds_id, parameter.ds_status = i, status
        with vlm_fast.strict():
            if gathered:
                connector(*inputs)
                continue
            with pytest.raises(vlm_fast.VlmFastFallbackError, match="ZeRO-3"):
                connector(*inputs)


# ---- with the library ----


def engine_of(model):
    import deepspeed

    os.environ["LOCAL_RANK"] = "0"
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(
        model=model, config=config, model_parameters=model.parameters()
    )
    return engine


def same_gradients(model, single):
    from deepspeed.utils import safe_get_full_grad

    theirs = dict(single.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if theirs[name].grad is not None:
            expected = theirs[name].grad
            atol = 1e-5 * max(1.0, expected.abs().max().item())
            found = safe_get_full_grad(parameter)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol, msg=name)
            compared += 1
    assert compared > 2


def whole_model_matches_one_process(rank, world, family, prepared):
    plain, fast, given = pair(family)
    if prepared:
        vlm_fast.prepare_zero3(fast)
    engine = engine_of(fast)
    vlm_fast.stats(reset=True)
    loss = engine(**batch_row(given, rank)).loss
    reasons = [why for counts in vlm_fast.stats().values() for why in counts["fallback"]]
    assert bool(reasons) != prepared and all("it has hooks" in why for why in reasons), reasons
    engine.backward(loss)
    losses = [plain(**batch_row(given, row)).loss for row in range(world)]
    (sum(losses) / world).backward()
    torch.testing.assert_close(loss, losses[rank], rtol=1e-4, atol=1e-5)
    same_gradients(fast, plain)


def rank_without_images_does_not_block_others(rank, world, kind, prepared):
    make, given = CONNECTORS[kind]
    torch.manual_seed(0)
    single = WithHead(make())
    single(*given(2))
    model = WithHead(make())
    model(*given(2))
    model.load_state_dict(single.state_dict())
    batches = [given(3), given(0)]
    if prepared:
        vlm_fast.prepare_zero3(model)
    engine = engine_of(model)
    engine.backward(engine(*batches[rank]).square().sum())
    (sum(single(*batch).square().sum() for batch in batches) / world).backward()
    same_gradients(model, single)


def images_and_videos_match_one_process(rank, world, name, prepared):
    """Images on one rank and a video on the other, the reverse, and both on both ranks."""
    for kinds in (BOTH[:1], BOTH[1:]), (BOTH[1:], BOTH[:1]), (BOTH, BOTH[::-1]), (BOTH[::-1], BOTH):
        if prepared and len(kinds[0]) > 1:
            continue  # raises
        plain, fast = plain_and_patched(name)
        if prepared:
            vlm_fast.prepare_zero3(fast)
        batches = [batch_of(name, of_rank) for of_rank in kinds]
        engine = engine_of(fast)
        engine.backward(engine(**batches[rank]).loss)
        (sum(plain(**batch).loss for batch in batches) / world).backward()
        same_gradients(fast, plain)


@pytest.mark.multiprocess
@pytest.mark.skipif(not INSTALLED, reason="deepspeed is not installed, see above")
def test_on_two_ranks(tmp_path):
    checks = [
        (check, name, prepared)
        for check, names in (
            (whole_model_matches_one_process, FAMILIES),
            (rank_without_images_does_not_block_others, CONNECTORS),
        )
        for name in names
        for prepared in (True, False)
    ]
    checks += [
        (images_and_videos_match_one_process, name, prepared)
        for name in BATCHES
        for prepared in (True, False)
    ]
    on_ranks(tmp_path, checks)
