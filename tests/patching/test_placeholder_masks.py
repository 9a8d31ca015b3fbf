"""The mask method of every class with placeholders gives the same masks, unpatched and patched."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import vlm_fast
from vlm_fast.patching.class_swap import swap
from vlm_fast.patching.models import image_token_merge
from vlm_fast.patching.models.image_token_merge import FusedMerge
from vlm_fast.patching.placeholder_masks import MaskSpec


def classes():
    """All classes of the installed transformers that define ``get_placeholder_mask``."""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source = path.read_text(encoding="utf8")
        if "def get_placeholder_mask" not in source:
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for written in re.split(r"^class ", source, flags=re.M)[1:]:
            if "def get_placeholder_mask" in written:
                yield getattr(module, re.match(r"\w+", written)[0])


CLASSES = {kind.__name__: kind for kind in classes()}
SERVED = {"4.57.6": 31, "5.8.1": 43, "5.17.0": 62, "5.24.0": 85}  # of 41, 57, 81 and 105 classes


def test_patched_mask_methods_match_unpatched():
    """The mask method unpatched and patched, on other ids than those used for probing."""
    torch.manual_seed(0)
    ids, embeds = torch.randint(0, 6, (3, 40)), torch.randn(3, 40, 5)
    for name, kind in CLASSES.items():
        form = image_token_merge.recognise(torch.nn.Module.__new__(kind))
        if not isinstance(form, MaskSpec):
            continue
        model = torch.nn.Module.__new__(kind)
        torch.nn.Module.__init__(model)
        given = dict.fromkeys(form.arguments)
        for number, path in enumerate(dict.fromkeys(form.id_paths)):
            if path[0] in given:
                given[path[0]] = number
                continue
            if not hasattr(model, path[0]):
                setattr(model, path[0], SimpleNamespace())
            setattr(getattr(model, path[0]), path[1], number)
        numbers = [list(dict.fromkeys(form.id_paths)).index(path) for path in form.id_paths]
        rows = {name: int((ids == numbers[index]).sum()) for name, index in form.counted_features}
        given |= {name: torch.randn(1, count, 5) for name, count in rows.items()}
        expected = listed(model.get_placeholder_mask(ids, inputs_embeds=embeds, **given))
        swap(model, FusedMerge, form)
        masks = listed(model.get_placeholder_mask(ids, inputs_embeds=embeds, **given))
        assert len(masks) == len(expected), name
        for ours, theirs in zip(masks, expected, strict=True):
            assert ours.shape == theirs.shape and torch.equal(ours[:], theirs), name
        vlm_fast.stats(reset=True)
        for argument, index in form.counted_features:
            source = given[argument]
            merged = embeds.masked_scatter(masks[index], source)
            assert torch.equal(merged, embeds.masked_scatter(expected[index], source)), name
            with pytest.raises(ValueError, match="do not match"):
                wrong = {argument: source[:, 1:]}
                model.get_placeholder_mask(ids, inputs_embeds=embeds, **given | wrong)
        assert vlm_fast.stats()["merge_image_tokens"]["fast"] == len(form.counted_features), name


def listed(answer):
    return list(answer) if isinstance(answer, tuple) else [answer]


def test_most_classes_are_recognised():
    found = [image_token_merge.recognise(torch.nn.Module.__new__(k)) for k in CLASSES.values()]
    served = sum(isinstance(form, MaskSpec) for form in found)
    assert served >= 0.7 * len(found)
    assert served == SERVED.get(transformers.__version__, served)
