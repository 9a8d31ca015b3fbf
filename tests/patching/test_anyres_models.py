"""Whole AnyRes models, patched against unpatched, and return formats of other releases."""

from contextlib import nullcontext

import pytest
import torch

import vlm_fast
from tests.ops.test_anyres_packing import model_of
from tests.support.tiny_anyres import ragged
from tests.support.ways_to_run import full_step, tensors
from vlm_fast.patching.models import anyres as patching
from vlm_fast.patching.models import anyres_result, image_token_merge

MIXINS = {
    "llava_next": "FusedAnyResMerge",
    "llava_onevision": "FusedPooledFrames",  # it packs tiles too
    "granite4_vision": "FusedAnyRes",
}


@pytest.mark.parametrize("name", MIXINS)
def test_patched_models_with_ragged_images_match_unpatched(name):
    model, inputs = ragged(name)
    generate = dict(inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    before, text = full_step(model, inputs), model.generate(**generate)
    report = vlm_fast.patch(model)
    assert report.patched["model"].endswith(f"by {MIXINS[name]}")
    with vlm_fast.strict():
        after = full_step(model, inputs)
        assert torch.equal(model.generate(**generate), text)
    assert vlm_fast.stats()["anyres_pack"]["fast"]
    verification = vlm_fast.verify(model, **inputs)
    assert verification.ok and "model (anyres_pack" in str(verification), verification
    assert after.keys() == before.keys()
    for where, value in after.items():
        assert type(value) is type(before[where]), where
        torch.testing.assert_close(value, before[where], rtol=1e-4, atol=2e-5)
    report.revert()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
def test_compiled_patched_model_matches_unpatched():
    """Image sizes are data, so the graph breaks where they are read, as it does unpatched."""
    model, inputs = ragged("llava_next")
    with torch.no_grad():
        before = model.model(**inputs)[0]
        vlm_fast.patch(model)
        torch._dynamo.reset()
        after = torch.compile(model.model, backend="eager")(**inputs)[0]
    assert vlm_fast.stats()["anyres_pack"]["fast"]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=2e-6)


def test_internal_tensor_subclass_does_not_leave_the_model():
    model, inputs = ragged("llava_next")
    vlm_fast.patch(model)
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    assert all(type(t) is torch.Tensor for _, t in tensors(features.pooler_output))
    inside, packed, get = [], [], model.model.get_image_features

    def keep(*args, **kwargs):  # some releases return them in outputs
        output = get(*args, **kwargs)
        inside.extend(type(image) for image in output.pooler_output)
        packed.extend(output.pooler_output)
        return output

    model.model.get_image_features = keep
    output = model(**inputs)
    assert inside == [anyres_result.PackedImage] * 2
    assert [type(image) for image in packed] == [torch.Tensor] * 2
    assert all(type(t) is torch.Tensor for _, t in tensors(dict(output)))
    for image, rows in zip(packed, features.pooler_output, strict=True):
        assert torch.equal(image, rows) and torch.equal(torch.cat([image, rows])[len(rows) :], rows)
        assert not {"whole", "place"} & vars(image).keys()
    assert patching._packed_images.get() is None
    with pytest.raises(ValueError, match="positive"):
        model(**inputs | {"image_sizes": inputs["image_sizes"] * 0})
    assert patching._packed_images.get() is None


@pytest.mark.parametrize(
    "returned, answer",
    [
        (lambda rows: ([rows], torch.tensor([len(rows)])), anyres_result.PackResult(True, False)),
        (lambda rows: [rows], anyres_result.PackResult(False, False)),
        (lambda rows: ([rows[0]], torch.tensor([2])), anyres_result.PackResult(True, True)),
        (lambda rows: torch.stack([rows]), "ValueError: it returns neither"),
        (lambda rows: ([rows], [len(rows)]), "AttributeError"),
        (lambda rows: ([rows], torch.tensor([9])), "ValueError: it returns neither"),
        (lambda rows: ([rows], torch.tensor([1]), 1.0), "AttributeError"),
        (lambda rows: [-rows], "ValueError: it returns neither"),
    ],
)
def test_return_format_of_base_class_is_probed(returned, answer):
    class Packs(torch.nn.Module):
        def pack_image_features(self, image_features, image_sizes, image_newline=None):
            return returned(image_features[0][0])

    if isinstance(answer, str):
        why = anyres_result.why_not_packed(Packs())
        assert why.startswith("pack_image_features cannot be probed: " + answer)
    else:
        assert anyres_result.probe_pack_method(Packs.pack_image_features) == answer
        assert anyres_result.why_not_packed(Packs()) is None


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_return_format_matches_base_class(counts, flat, monkeypatch):
    """Some releases return no counts, or flat features for an image of one tile."""
    model = model_of("llava_next")
    vlm_fast.patch(model)
    monkeypatch.setattr(type(model), "pack_result", anyres_result.PackResult(counts, flat))
    options = dict(image_newline=torch.randn(24), vision_feature_select_strategy="full")
    found = model.pack_image_features([torch.randn(5, 16, 24)], [[32, 32]], **options)
    assert isinstance(found, tuple if counts else list)
    with pytest.warns(UserWarning, match="a single tile") if flat else nullcontext():
        model.pack_image_features([torch.randn(1, 16, 24)], [[32, 32]], **options)


def test_unsupported_merge_is_skipped_with_reason(monkeypatch):
    model, inputs = ragged("llava_next")
    before = model(**inputs).logits
    monkeypatch.setattr(image_token_merge, "recognise", lambda module: "no such merge")
    report = vlm_fast.patch(model.model)
    assert report.patched[""].endswith("by FusedAnyRes")
    assert report.skipped[""] == "no such merge"
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-4, atol=2e-6)
