"""Two independent readers of every class of the installed transformers that has placeholders."""

import inspect

import torch
import transformers

from tests import placeholder_sources
from vlm_fast.patching import image_token_merge, placeholder_forms
from vlm_fast.patching.placeholder_forms import Form, NotRead

CLASSES = {kind.__name__: kind for kind in placeholder_sources.classes()}
SERVED = {"4.57.6": 31, "5.8.1": 43, "5.17.0": 62, "5.24.0": 85}  # of 41, 57, 81 and 105


def by_asking(method):
    try:
        form = placeholder_forms.read(inspect.unwrap(method))
    except NotRead as reason:
        return str(reason)
    ids = tuple(".".join(path) for path in form.ids)
    return ids, {name: ids[index] for name, index in form.counted}, form.expanded


def by_source(method):
    try:
        return placeholder_sources.read_masks(method)
    except placeholder_sources.Unknown as reason:
        return str(reason)


def test_source_and_answers_agree():
    apart = {}
    for name, kind in CLASSES.items():
        asked = by_asking(kind.get_placeholder_mask)
        read = by_source(kind.get_placeholder_mask)
        both_refuse = isinstance(asked, str) and isinstance(read, str)
        # What is asked must have no names that are unknown, be they harmless.
        unknown = isinstance(asked, str) and asked.startswith(("uses ", "has functions"))
        if not (asked == read or both_refuse or unknown):
            apart[name] = asked, read
    assert apart == {}


def test_masks_go_straight_to_the_merge():
    astray = {}
    for name, kind in CLASSES.items():
        if isinstance(image_token_merge.recognise(torch.nn.Module.__new__(kind)), Form):
            try:
                assert placeholder_sources.follow_masks(kind.forward) >= 1, name
            except placeholder_sources.Unknown as reason:
                astray[name] = str(reason)
    assert astray == {}


def test_most_classes_are_served():
    found = [image_token_merge.recognise(torch.nn.Module.__new__(k)) for k in CLASSES.values()]
    served = sum(isinstance(form, Form) for form in found)
    assert served >= 0.7 * len(found)
    assert served == SERVED.get(transformers.__version__, served)
