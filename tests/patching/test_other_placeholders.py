"""Placeholder code of future releases: patched with equal results, or skipped with a reason."""

import os
import warnings

import pytest
import torch

import vlm_fast
from tests.support.placeholder_models import EQUAL, HIDDEN, IDS, ROWS, SERVED, SKIPPED, Model
from vlm_fast.patching.models import image_token_merge


def run(model, rows):
    """The output, and gradients of features and embeddings."""
    torch.manual_seed(0)
    features = torch.randn(rows, HIDDEN, requires_grad=True)
    merged = model(IDS, features)
    wanted = [features, model.embed.weight]
    return [merged, *torch.autograd.grad(merged.square().sum(), wanted, allow_unused=True)]


@pytest.mark.parametrize("kind", [*SERVED, *EQUAL, *SKIPPED], ids=lambda kind: kind.__name__)
def test_changed_models_are_patched_correctly_or_skipped(kind):
    model, rows = kind(), ROWS.get(kind, 3)
    before = run(model, rows)
    with warnings.catch_warnings(record=True):
        report = vlm_fast.patch(model)
    vlm_fast.stats(reset=True)
    for ours, theirs in zip(run(model, rows), before, strict=True):
        assert type(ours) is type(theirs)
        assert ours is None or torch.equal(ours, theirs)
    merges = vlm_fast.stats().get("merge_image_tokens", {}).get("fast", 0)
    assert merges == (kind in SERVED)
    if kind in SKIPPED:
        assert SKIPPED[kind] in report.skipped[""] and not report.patched
    else:
        assert report.patched == {"": f"{kind.__name__} by FusedMerge"} and not report.skipped


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("kind", [*SERVED, *EQUAL], ids=lambda kind: kind.__name__)
def test_wrong_count_raises_for_any_use_of_the_mask(kind, rows, monkeypatch):
    """The host raises with the model's message; on CUDA the device checks the count."""
    model = kind()
    with pytest.raises(ValueError, match="do not match"):
        run(model, rows)
    vlm_fast.patch(model)
    with pytest.raises(ValueError, match="do not match"):
        run(model, rows)
    monkeypatch.setattr(image_token_merge, "would_sync", lambda tensor: True)
    where = "merge_image_tokens: image_" if kind in SERVED else "get_placeholder_mask: "
    with pytest.raises(ValueError, match=f"{where}features has {rows} rows, expected 3"):
        run(model, rows)
    run(model, 3)


def test_features_of_wrong_shape_raise():
    model = Model()
    vlm_fast.patch(model)
    with pytest.raises(ValueError, match="do not match"):
        model(IDS, torch.randn(7))


def test_changed_token_id_in_config_is_used():
    model = Model()
    vlm_fast.patch(model)
    model.config.image_token_id = 94
    theirs = Model()
    theirs.config.image_token_id, theirs.embed = 94, model.embed
    for ours, expected in zip(run(model, 1), run(theirs, 1), strict=True):
        assert torch.equal(ours, expected)
    assert run(model, 1)[1].abs().sum() > 0


def test_code_outside_the_merge_sees_a_plain_tensor():
    model = Model()
    vlm_fast.patch(model)
    embeds = model.embed(IDS)
    mask = model.get_placeholder_mask(IDS, embeds, torch.zeros(3, HIDDEN))
    assert isinstance(mask, image_token_merge.PlaceholderMask)
    assert isinstance(mask.to("cpu"), image_token_merge.PlaceholderMask)
    others = [mask[..., 0], mask | mask, ~mask, mask.sum(), mask.to(torch.float), embeds.to(mask)]
    others += [torch.where(mask, embeds, 0.0), torch.cat([mask, mask]), embeds.masked_fill(mask, 0)]
    assert {type(other) for other in others} == {torch.Tensor}
    assert type(model.get_placeholder_mask(IDS, embeds, image_features=None)) is torch.Tensor


def test_placeholders_are_found_by_their_embeddings():
    model, features = Model(), torch.randn(3, HIDDEN)
    before = model(IDS, features)
    vlm_fast.patch(model)
    assert torch.equal(model(None, features, model.embed(IDS)), before)
    assert vlm_fast.stats()["merge_image_tokens"]["fast"] == 1
    with pytest.raises(ValueError, match="do not match"):
        model(None, features[1:], model.embed(IDS))


SWITCH = "TRANSFORMERS_DISABLE_TORCH_CHECK"


def torch_compilable_check(condition, message):
    if os.getenv(SWITCH, "0") != "1" and not condition:
        raise ValueError(message)


class Checks(Model):
    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        mask = (input_ids == self.config.image_token_id).unsqueeze(-1)
        fits = mask.sum() * inputs_embeds.shape[-1] == image_features.numel()
        torch_compilable_check(fits, "do not match")
        return mask


def test_class_is_probed_with_its_checks_enabled(monkeypatch):
    """With checks disabled the host does not check the count, but the device still does."""
    monkeypatch.setenv(SWITCH, "1")
    model = Checks()
    unchecked = run(model, 5)
    assert vlm_fast.patch(model).patched and os.environ[SWITCH] == "1"
    for ours, theirs in zip(run(model, 5), unchecked, strict=True):
        assert torch.equal(ours, theirs)
    monkeypatch.setattr(image_token_merge, "would_sync", lambda tensor: True)
    with pytest.raises(ValueError, match="image_features has 5 rows, expected 3"):
        run(model, 5)
    monkeypatch.delenv(SWITCH)
    assert vlm_fast.patch(Checks()).patched and SWITCH not in os.environ
