"""Facts about objects are compared alike by the extension and by Python code."""

import gc
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

from vlm_fast.kernels._host import host
from vlm_fast.ops import facts
from vlm_fast.ops.facts import KINDS, compared, in_python, tensor_description


class Thing:
    """An object with attributes."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


A, B, OTHER = Thing(), Thing(), Thing()
WEIGHT = nn.Parameter(torch.zeros(3, 4))
# For each kind (object, key, value) of facts that hold, then of facts that do not.
CASES = {
    "item": ([({"a": A}, "a", A)], [({"a": A}, "a", B), ({}, "a", A)]),
    "no item": ([({}, "a", None)], [({"a": None}, "a", None)]),
    "false item": (
        [({"a": {}}, "a", None), ({}, "a", None), ({"a": 0}, "a", None)],
        [({"a": {1: 2}}, "a", None), ({"a": A}, "a", None)],
    ),
    "keys": (
        [({"a": A, "b": B}, None, ("a", "b")), ({}, None, ())],
        [({"a": A, "b": B}, None, ("b", "a")), ({"a": A}, None, ("a", "b")), ({}, None, ("a",))],
    ),
    "values": (
        [({"a": A, "b": None}, None, (A, None)), (OrderedDict(a=A), None, (A,))],
        [({"a": A, "b": B}, None, (B, A)), ({"a": A}, None, ()), ({"a": A}, None, (B,))],
    ),
    "length": ([({"a": A}, None, 1)], [({"a": A}, None, 0)]),
    "type": ([(A, None, Thing)], [(A, None, object), (Thing, None, Thing)]),
    "attribute": ([(Thing(a=A), "a", A)], [(Thing(a=A), "a", B), (Thing(), "a", A)]),
    "equal attribute": (
        [(Thing(a="ab" * 50), "a", "a" + "ba" * 49 + "b")],
        [(Thing(a="x"), "a", "y"), (Thing(), "a", "y")],
    ),
    "false attribute": (
        [(Thing(a=False), "a", None), (Thing(), "a", None)],
        [(Thing(a=True), "a", None)],
    ),
    "call": (
        [(lambda *given: given[1], (1, A), A), (lambda: True, (), True)],
        [(lambda: None, (), A), (dict.__getitem__, ({}, 1), A)],
    ),
    "tensor": (
        [(WEIGHT, None, WEIGHT), (nn.Parameter(WEIGHT + 1), None, WEIGHT)],
        [
            (other, None, WEIGHT)
            for other in (
                WEIGHT.double(), nn.Parameter(WEIGHT[:2]), nn.Parameter(WEIGHT.half()),
                nn.Parameter(torch.zeros(4, 3).t()), nn.Parameter(torch.zeros(2, 6)), None, 3,
            )
        ],
    ),
}  # fmt: skip


@pytest.fixture(params=["extension", "python"])
def compare(request, monkeypatch):
    """Compile facts by one of the two ways."""
    if request.param == "python":
        monkeypatch.setattr(host, "module", None)
        monkeypatch.setattr(host, "describe", None)
        return in_python
    if host.module is None:
        pytest.skip("the extension is not built")
    return compared


def with_descriptions(kind, thing, key, value):
    return kind, thing, key, tensor_description(value) if kind == "tensor" else value


def test_every_kind_has_cases():
    assert CASES.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_facts_hold_or_not(compare, kind):
    held, broken = ([with_descriptions(kind, *case) for case in part] for part in CASES[kind])
    assert compare(held)() is True
    for fact in broken:
        assert compare([fact])() is False
        assert compare([*held, fact, *held])() is False


def test_a_change_is_seen(compare):
    own = {"weight": WEIGHT}
    holds = compare([("item", own, "weight", WEIGHT), ("length", own, None, 1)])
    assert holds() and holds()
    own["bias"] = None
    assert not holds()
    del own["bias"]
    assert holds()
    own["weight"] = nn.Parameter(WEIGHT)
    assert not holds()


def test_other_errors_are_raised(compare):
    def fails():
        raise RuntimeError("of the function")

    with pytest.raises(RuntimeError, match="of the function"):
        compare([("call", fails, (), None)])()


def test_facts_are_collected_with_their_objects(compare):
    thing = Thing()
    thing.holds = compare([("attribute", thing, "other", A)])
    gone = weakref.ref(thing)
    del thing
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(host.module is None, reason="the extension is not built")
def test_extension_refuses_what_is_no_fact():
    for wrong in [
        (1, 2), (0, [], "a", A), (3, {}, None, ["a"]), (len(KINDS), {}, "a", A), (-1, {}, "a", A),
        (7, A, 3, A), (10, len, [1], A), (11, WEIGHT, None, "text"), ("item", {}, "a", A),
    ]:  # fmt: skip
        with pytest.raises(TypeError, match="fact 0"):
            host.module.Facts((wrong,))
    with pytest.raises(TypeError, match="no arguments"):
        host.module.Facts(())(1)


def test_kinds_are_those_of_the_extension():
    source = (facts.__file__, "csrc/launch_facts.h")[1]
    root = type(host).__init__.__globals__["SOURCES"]
    text = (root / source.split("/")[1]).read_text()
    names = text.split("typedef enum {")[1].split("}")[0]
    found = [line.split(",")[0].strip() for line in names.splitlines() if "," in line]
    assert [name.lower().replace("_", " ") for name in found] == list(KINDS)
