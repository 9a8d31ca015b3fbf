"""Small transformers models: what is patched in each, and parity with unpatched."""

import sys
from contextlib import ExitStack, nullcontext
from unittest import mock

import pytest
import torch
import transformers

import vlm_fast
from tests.support.tiny_models import AUDIO, IMAGE, MODELS, build
from tests.support.ways_to_run import full_step, labels, tensors
from tests.tools.releases import RELEASES, served
from vlm_fast.devtools.memory import host_syncs
from vlm_fast.patching.models import image_token_merge
from vlm_fast.patching.placeholder_masks import MaskSpec

IDLE = {"janus": "model.generation_head"}  # patched, but not called in a training step
# What docs/releases.md lists for the installed release; `make versions` writes it.
SERVED = {name: served()[name].get(transformers.__version__, {}) for name in MODELS}
MERGE = [name for name, found in SERVED.items() if "merge_image_tokens" in found.get("ops", {})]
pytestmark = pytest.mark.skipif(
    transformers.__version__ not in RELEASES, reason="no table holds this release of transformers"
)


def patch(name, model):
    """Patch and check that exactly the expected modules are patched."""
    expected = SERVED[name]["served"]
    with nullcontext() if expected else pytest.warns(UserWarning, match="no connector of"):
        report = vlm_fast.patch(model)
    assert sorted({what.split(" by ")[1] for what in report.patched.values()}) == expected


@pytest.mark.parametrize("name", MODELS)
def test_patched_matches_unpatched(name):
    model, inputs = build(name)
    generate = dict(inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    before, text = full_step(model, inputs), model.generate(**generate)
    patch(name, model)
    with vlm_fast.strict():
        after = full_step(model, inputs)
        calls = {op: counts["fast"] for op, counts in vlm_fast.stats().items()}
        assert torch.equal(model.generate(**generate), text)
    expected = SERVED[name].get("ops", {})
    assert {op: count for op, count in calls.items() if count} == expected
    assert after.keys() == before.keys()
    for where, value in after.items():
        assert type(value) is type(before[where]), where
        if expected.keys() - {"merge_image_tokens"}:  # not only rows are copied
            torch.testing.assert_close(value, before[where], rtol=1e-4, atol=2e-6)
        else:
            assert torch.equal(value, before[where]), where
    if vlm_fast.explain(model):
        verification = vlm_fast.verify(model, **inputs, **labels(model, inputs))
        idle = [IDLE[name]] if name in IDLE else []
        assert verification.ok and list(verification.unreached) == idle, verification


def logits_and_syncs(model, inputs, asking):
    """Logits, and the host syncs of the models in ``asking`` before their features are merged."""
    counts = []

    def counted(function):
        def watched(*args, **kwargs):
            found = []
            counts.append(host_syncs(lambda: found.append(function(*args, **kwargs)), "cpu"))
            return found[0]

        return watched

    watched = [(module, "get_placeholder_mask") for module in asking]
    watched.append((image_token_merge, "_masked_scatter"))
    with torch.no_grad(), ExitStack() as stack:
        for owner, name in watched:
            stack.enter_context(mock.patch.object(owner, name, counted(getattr(owner, name))))
        return model(**inputs, **labels(model, inputs)).logits, sum(counts)


@pytest.mark.parametrize("name", MERGE)
def test_merge_does_not_sync_and_returns_plain_tensors(name, monkeypatch):
    """As on CUDA, where the merge counts placeholders on the device."""
    model, inputs = build(name)
    asking = [m for m in model.modules() if isinstance(image_token_merge.recognise(m), MaskSpec)]
    logits, syncs = logits_and_syncs(model, inputs, asking)
    assert syncs

    leaks = []

    def look(module, args, kwargs, output):
        for where, tensor in tensors((args, kwargs, output)):
            if isinstance(tensor, image_token_merge.PlaceholderMask):
                leaks.append((type(module).__name__, where))

    patch(name, model)
    monkeypatch.setattr(image_token_merge, "would_sync", lambda count: True)
    merge = sys.modules[vlm_fast.ops.merge_image_tokens.__module__]
    monkeypatch.setattr(merge, "check_count", lambda *args: None)
    for module in model.modules():
        if any(module.children()):  # hooks on linears would make the projector fall back
            module.register_forward_hook(look, with_kwargs=True)
    patched, syncs = logits_and_syncs(model, inputs, asking)
    assert syncs == 0 and leaks == []
    torch.testing.assert_close(patched, logits, rtol=1e-4, atol=2e-6)


def test_audio_features_may_outnumber_placeholders():
    """The model's own audio merge does not check the count either."""
    model, inputs = build("qwen2_5_omni")
    inputs["input_ids"][0, inputs["input_ids"][0] == AUDIO] = 9
    before = model(**inputs).logits
    patch("qwen2_5_omni", model)
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["llava", "video_llava", "llava_onevision", "qwen3_vl"])
def test_wrong_placeholder_counts_raise(name):
    model, inputs = build(name)
    inputs["input_ids"][0, (inputs["input_ids"][0] == IMAGE).nonzero()[0]] = 9
    patch(name, model)
    with pytest.raises(
        ValueError, match=r"Image features and image tokens do not match[,:] tokens: "
    ):
        model(**inputs)
