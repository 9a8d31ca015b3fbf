"""Patched models with accelerate's device maps, in copies and in files."""

import copy

import accelerate
import pytest
import torch
import transformers

import vlm_fast
from tests.support.copies import COPIES
from tests.support.whole_models import (
    FAMILIES,
    assert_close,
    every_family,
    pair,
    reasons,
    same_logits,
    step,
)

# Each connector that falls back warns once; tests check the reason themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning"),
    pytest.mark.filterwarnings("ignore:no connector of"),
]


# ---- places: accelerate ----


def dispatched(model, family, folder, offloaded):
    """Dispatch with all modules on the CPU, or with connectors offloaded to disk."""
    places = {}
    for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        unit = next((c for c in FAMILIES[family].connectors if name.startswith(f"{c}.")), None)
        places[unit or name] = "disk" if unit and offloaded else "cpu"
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )  # without force_hooks accelerate sets no hooks on a single device


@pytest.mark.parametrize("offloaded", [False, True], ids=["on the CPU", "on the disk"])
@every_family
def test_device_map(family, offloaded, tmp_path):
    plain, fast, given = pair(family)
    fast = dispatched(fast, family, tmp_path, offloaded)
    same_logits(fast, plain, given)
    assert all("its forward has been replaced" in reason for reason in reasons(fast))
    assert reasons(fast)
    if not offloaded:
        accelerate.hooks.remove_hook_from_submodules(fast)
        with vlm_fast.strict():
            same_logits(fast, plain, given)


@every_family
def test_dispatched_modules_are_not_patched(family, tmp_path):
    """accelerate's hooks replace the forward; patches that need no forward are still applied."""
    plain, _, given = pair(family)
    model = dispatched(copy.deepcopy(plain), family, tmp_path, False)
    report = vlm_fast.patch(model)
    found = {name: report.skipped.get(name) for name in FAMILIES[family].connectors}
    assert all("its forward has been replaced" in (why or "") for why in found.values()), found
    assert not report.patched.keys() & found.keys()
    same_logits(model, plain, given)


@every_family
def test_load_checkpoint_and_dispatch_into_patched_model(family, tmp_path):
    plain, _, given = pair(family)
    file = str(tmp_path / "pytorch_model.bin")
    torch.save(plain.state_dict(), file)
    with accelerate.init_empty_weights(include_buffers=False):
        empty = type(plain)(copy.deepcopy(plain.config)).eval()
    vlm_fast.patch(empty, strict=True)
    assert all("meta" in reason for reason in reasons(empty)) and reasons(empty)
    empty.tie_weights()
    accelerate.load_checkpoint_and_dispatch(empty, file, device_map={"": "cpu"})
    with vlm_fast.strict():
        same_logits(empty, plain, given)


# ---- copies and files ----


@pytest.mark.parametrize("copied", COPIES)
@every_family
def test_copies_are_independent_patched_models(family, copied):
    plain, fast, given = pair(family)
    twin = copied(fast)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fast.modules()]
    with torch.no_grad():
        for parameter in fast.parameters():  # they share no memory
            parameter.zero_()
    with vlm_fast.strict():
        assert_close(step(twin, given), step(plain, given))
    vlm_fast.unpatch(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]


@every_family
def test_checkpoints_match_unpatched(family, tmp_path):
    plain, fast, given = pair(family)
    assert list(fast.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.01)
    fast.load_state_dict(plain.state_dict(), strict=True)
    fast.save_pretrained(tmp_path)  # safetensors
    loaded = getattr(transformers, type(plain).__name__).from_pretrained(tmp_path).eval()
    assert not vlm_fast.explain(loaded)
    same_logits(loaded, plain, given)
    loaded = loaded.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in plain.state_dict().items())
    with vlm_fast.strict():
        same_logits(fast.train().eval(), plain, given)


@every_family
def test_patches_of_two_models_are_independent(family):
    plain, fast, given = pair(family)
    again = vlm_fast.patch(fast)
    assert not again.patched
    other = copy.deepcopy(plain)
    report = vlm_fast.patch(other)
    report.revert()
    assert [type(m) for m in other.modules()] == [type(m) for m in plain.modules()]
    assert vlm_fast.explain(fast) and not vlm_fast.explain(other)
    same_logits(other, fast, given)
