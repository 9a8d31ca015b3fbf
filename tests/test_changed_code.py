"""Code of transformers that changes under a patch: a reason not to patch, or the same results.

As in a release that nobody has read yet: parameters have other names, methods return something else,
instances lack attributes. What raises then raises unpatched as well, and nothing is wrong.
"""

import copy

import pytest
import transformers

import vlm_fast
from tests.across_releases import forward, generated, labels, said, why_different
from tests.changed_code import Code
from tests.families import build
from tests.releases import served
from vlm_fast.patching import FAMILIES
from vlm_fast.patching.class_swap import Patched, _overridden

RELEASE = "5.17.0"
pytestmark = [
    pytest.mark.skipif(transformers.__version__ != RELEASE, reason=f"the cases are of {RELEASE}"),
    pytest.mark.filterwarnings("ignore"),
]
ELSEWHERE = {"FusedGatedBlock", "FusedPerceiver"}  # of OpenFlamingo, no class of transformers


def case_of(mixin):
    """The first model in which a mixin serves something."""
    found = (case for case, cells in served().items() if mixin in cells[RELEASE].get("served", ()))
    return next(found, None)


CASES = {mixin.__name__: (mixin, case_of(mixin.__name__)) for mixin, _ in FAMILIES}
CASES = {name: found for name, found in CASES.items() if name not in ELSEWHERE}
every_mixin = pytest.mark.parametrize("mixin", CASES)


def test_every_mixin_has_a_model():
    assert CASES and all(case is not None for _, case in CASES.values())


class Model:
    """The model of a mixin, what it computes unpatched, and the modules that are served by it."""

    def __init__(self, mixin):
        self.mixin, case = CASES[mixin]
        self.model, self.inputs = build(case)
        self.generates = True
        fast = copy.deepcopy(self.model)
        vlm_fast.patch(fast)
        self.names = [n for n, m in fast.named_modules() if served_by(m) is self.mixin]
        self.kind = type(self.model.get_submodule(self.names[0]))
        try:
            generated(self.model, self.inputs)
        except Exception:
            self.generates = False

    def run(self, model):
        """Outputs and generated tokens, or the exception."""
        try:
            found = forward(model, self.inputs | labels(model, self.inputs))
            if self.generates:
                found |= {f"generated {k}": v for k, v in few(model, self.inputs).items()}
            return found
        except Exception as error:
            return error

    def why_wrong(self, change=None):
        """What is wrong with the model patched as its classes are now, or None."""
        plain, fast = copy.deepcopy(self.model), copy.deepcopy(self.model)
        for model in (plain, fast):
            if change is not None:
                change(model)
        theirs = self.run(plain)
        if isinstance(theirs, Exception):
            return None
        try:
            report = vlm_fast.patch(fast)
        except Exception as error:
            return f"patch raises {said(error)}"
        ours = self.run(fast)
        if isinstance(ours, Exception):
            return f"raises {said(ours)}"
        again = lambda model, inputs: self.run(model)  # noqa: E731
        reason = why_different(ours, theirs, again, plain, self.inputs)
        left = [name for name in self.names if not isinstance(fast.get_submodule(name), Patched)]
        if reason is None and not set(left) <= report.skipped.keys():
            reason = f"{', '.join(left)} left unpatched without a reason"
        return reason


def few(model, inputs):
    return generated(model, inputs, max_new_tokens=2, min_new_tokens=2)


def served_by(module):
    return type(module).patch.mixin if isinstance(module, Patched) else None


def methods(model):
    """The code of every method that the mixin has in the place of the class's, or restates."""
    for name in dict.fromkeys([*_overridden(model.kind, model.mixin), *model.mixin.restates]):
        if hasattr(model.kind, name):
            yield Code(model.kind, name)


@every_mixin
def test_a_parameter_has_another_name(mixin):
    model, wrong, tried = Model(mixin), [], 0
    for code in methods(model):
        for parameter in code.parameters:
            with code.changed(code.renamed(parameter)):
                reason = model.why_wrong()
            tried += 1
            if reason is not None:
                wrong.append(f"{code.kind.__name__}.{code.name}, {parameter}: {reason}")
    assert tried and not wrong, "\n".join(wrong)


@every_mixin
def test_a_method_returns_something_else(mixin):
    model, wrong, tried = Model(mixin), [], 0
    for code in methods(model):
        with code.changed(code.other_returns()):
            reason = model.why_wrong()
        tried += 1
        if reason is not None:
            wrong.append(f"{code.kind.__name__}.{code.name}: {reason}")
    assert tried and not wrong, "\n".join(wrong)


@every_mixin
def test_an_attribute_is_gone(mixin):
    """Only where the class itself does not read it."""
    model, wrong = Model(mixin), []
    for place, attribute in attributes(model):

        def gone(changed, place=place, attribute=attribute):
            for name in model.names:
                delattr(changed.get_submodule(name).get_submodule(place), attribute)

        reason = model.why_wrong(gone)
        if reason is not None:
            wrong.append(f"{place or 'itself'}, {attribute}: {reason}")
    assert not wrong, "\n".join(wrong)


def attributes(model):
    """Plain attributes of the module and of what is inside it, as far as transformers wrote it."""
    root = model.model.get_submodule(model.names[0])
    for place, module in root.named_modules():
        whole = isinstance(module, transformers.PreTrainedModel) or place.count(".") > 3
        if (place and whole) or not type(module).__module__.startswith("transformers."):
            continue
        for attribute in vars(module):
            if not attribute.startswith("_") and attribute != "training":
                yield place, attribute


def test_changed_code_is_what_runs(monkeypatch):
    """The edits are there: unpatched the results are others, and the source says why."""
    import inspect

    model = Model("FusedMLP")
    code = Code(model.kind, "forward")
    before = inspect.getsource(model.kind.forward)
    with code.changed(code.other_returns()):
        assert isinstance(model.run(model.model), Exception)
        assert ",)" in inspect.getsource(model.kind.forward)
    with code.changed(code.renamed(code.parameters[0])):
        assert f"{code.parameters[0]}_of_later" in inspect.signature(model.kind.forward).parameters
        assert not isinstance(model.run(model.model), Exception)
    assert inspect.getsource(model.kind.forward) == before
