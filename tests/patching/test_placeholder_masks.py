"""Two independent readers of all transformers classes with placeholders agree."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers

import vlm_fast
from tests.support import placeholder_sources
from vlm_fast.patching import placeholder_masks
from vlm_fast.patching.class_swap import swap
from vlm_fast.patching.models import image_token_merge
from vlm_fast.patching.models.image_token_merge import FusedMerge
from vlm_fast.patching.placeholder_masks import MaskSpec, UnknownMaskMethod

CLASSES = {kind.__name__: kind for kind in placeholder_sources.classes()}
SERVED = {"4.57.6": 31, "5.8.1": 43, "5.17.0": 62, "5.24.0": 85}  # of 41, 57, 81 and 105 classes


def by_probing(method):
    try:
        form = placeholder_masks.probe_mask_method(inspect.unwrap(method))
    except UnknownMaskMethod as reason:
        return str(reason)
    ids = tuple(".".join(path) for path in form.id_paths)
    return ids, {name: ids[index] for name, index in form.counted_features}, form.expanded


def by_source(method):
    try:
        return placeholder_sources.read_masks(method)
    except placeholder_sources.Unknown as reason:
        return str(reason)


def test_source_reader_and_probing_agree():
    apart = {}
    for name, kind in CLASSES.items():
        probed = by_probing(kind.get_placeholder_mask)
        read = by_source(kind.get_placeholder_mask)
        both_refuse = isinstance(probed, str) and isinstance(read, str)
        # Probing refuses unknown argument names, also harmless ones.
        unknown = isinstance(probed, str) and probed.startswith(("uses ", "has functions"))
        if not (probed == read or both_refuse or unknown):
            apart[name] = probed, read
    assert apart == {}


def test_masks_are_used_only_by_the_merge():
    astray = {}
    for name, kind in CLASSES.items():
        if isinstance(image_token_merge.recognise(torch.nn.Module.__new__(kind)), MaskSpec):
            try:
                assert placeholder_sources.follow_masks(kind.forward) >= 1, name
            except placeholder_sources.Unknown as reason:
                astray[name] = str(reason)
    assert astray == {}


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
