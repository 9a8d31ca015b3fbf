"""Changed transformers code, as in a future release: a reason not to patch, or equal results.

Parameters are renamed, methods return something else, and instances lack attributes. If the
unpatched model raises, the patched one must raise too. No result may be wrong.
"""

import contextlib
import copy
import sys
from unittest import mock

import pytest
import transformers

import vlm_fast
from tests.support.across_releases import error_line, why_different
from tests.support.changed_code import File
from tests.support.families import build
from tests.support.selection import slow_except
from tests.support.ways_to_run import forward, generated, labels
from tests.tools.releases import served
from vlm_fast.patching import class_swap
from vlm_fast.patching.families import FAMILIES
from vlm_fast.patching.patched_module import PatchedModule, overridden_methods

RELEASE = "5.17.0"
pytestmark = [
    pytest.mark.skipif(transformers.__version__ != RELEASE, reason=f"the cases are of {RELEASE}"),
    pytest.mark.filterwarnings("ignore"),
]
ELSEWHERE = {"FusedGatedBlock", "FusedPerceiver"}  # OpenFlamingo's class is not in transformers


def case_of(mixin):
    """The first case in which a mixin patches a module."""
    cells = ((case, found.get(RELEASE, {})) for case, found in served().items())
    return next((case for case, cell in cells if mixin in cell.get("served", ())), None)


CASES = {mixin.__name__: (mixin, case_of(mixin.__name__)) for mixin, _ in FAMILIES}
CASES = {name: found for name, found in CASES.items() if name not in ELSEWHERE}
every_mixin = pytest.mark.parametrize("mixin", slow_except(list(CASES)[::5], CASES))


def test_each_mixin_has_a_model():
    assert CASES and all(case is not None for _, case in CASES.values())


class Model:
    """The model of a mixin, its unpatched results, and the modules that the mixin patches."""

    def __init__(self, mixin):
        self.mixin, case = CASES[mixin]
        self.model, self.inputs = build(case)
        fast = copy.deepcopy(self.model)
        vlm_fast.patch(fast)
        self.served = {n: served_by(m) for n, m in fast.named_modules() if served_by(m)}
        self.names = [name for name, kind in self.served.items() if kind is self.mixin]
        assert self.names, f"nothing in {case} is served by {mixin}"
        self.kind = type(self.model.get_submodule(self.names[0]))
        self.generates = hasattr(self.model, "generate")
        self.ran, self.wrong = 0, []

    def run(self, model):
        """Outputs and generated tokens, or the exception that was raised."""
        try:
            found = forward(model, self.inputs | labels(model, self.inputs))
            if self.generates:
                few = generated(model, self.inputs, max_new_tokens=2, min_new_tokens=2)
                found |= {f"generated {name}": value for name, value in few.items()}
            return found
        except Exception as error:
            return error

    def judge(self, what, change=lambda model: None):
        """Compare patched with unpatched under the current classes; True if the latter runs."""
        plain, fast = copy.deepcopy(self.model), copy.deepcopy(self.model)
        change(plain)
        theirs = self.run(plain)
        if isinstance(theirs, Exception):
            return False
        change(fast)
        self.ran += 1
        reason = self.why_wrong(fast, plain, theirs)
        if reason is not None:
            self.wrong.append(f"{what}: {reason}")
        return True

    def why_wrong(self, fast, plain, theirs):
        class_swap._swapped_classes.clear()  # clear caches, as in a new process
        try:
            report = vlm_fast.patch(fast)
        except Exception as error:
            return f"patch raises {error_line(error)}"
        ours = self.run(fast)
        if isinstance(ours, Exception):
            return f"raises {error_line(ours)}"
        left = [name for name in self.names if not served_by(fast.get_submodule(name))]
        if not set(left) <= report.skipped.keys():
            return f"{', '.join(left)} left unpatched without a reason"
        again = lambda model, inputs: self.run(model)  # noqa: E731
        return why_different(ours, theirs, again, plain, self.inputs)


def served_by(module):
    return type(module).patch_spec.mixin if isinstance(module, PatchedModule) else None


def methods(model):
    """Yield file, class and name of every method that the mixin replaces."""
    for name in dict.fromkeys(
        [*overridden_methods(model.kind, model.mixin), *model.mixin.mirrored_methods]
    ):
        if hasattr(model.kind, name):
            definer = next(base for base in model.kind.__mro__ if name in vars(base))
            yield File(sys.modules[definer.__module__]), definer.__name__, name


@every_mixin
def test_renamed_parameter(mixin):
    model = Model(mixin)
    for file, kind, name in methods(model):
        for parameter in file.parameters(kind, name):
            what = f"{kind}.{name}, {parameter}"
            with file.changed(file.renamed_everywhere(parameter), parameter):
                ran = model.judge(f"{what}, in the whole file")
            if not ran:  # its caller is in another file
                with file.changed(file.renamed(parameter, kind, name)):
                    model.judge(what)
    assert model.ran and not model.wrong, "\n".join(model.wrong)


@every_mixin
def test_changed_return_value(mixin):
    model = Model(mixin)
    for file, kind, name in methods(model):
        with file.changed(file.other_returns(kind, name)):
            model.judge(f"{kind}.{name}")
    assert not model.wrong, "\n".join(model.wrong)


@every_mixin
def test_forward_returning_a_tuple(mixin):
    model = Model(mixin)
    for file, kind, name in methods(model):
        if name == "forward":
            with file.changed(file.returning_a_tuple(kind)):
                model.judge(f"{kind}.{name}")
    assert not model.wrong, "\n".join(model.wrong)


@every_mixin
def test_missing_attributes(mixin):
    """Delete all attributes that the class does not read itself."""
    model = Model(mixin)
    gone = unread(model)

    def change(changed):
        for name in model.names:
            for module in changed.get_submodule(name).modules():
                for attribute in gone.get(type(module), ()):
                    vars(module).pop(attribute, None)

    shown = {kind.__name__: sorted(names) for kind, names in gone.items()}
    assert model.judge(f"without {shown}", change), shown
    assert not model.wrong, "\n".join(model.wrong)


def unread(model):
    """Plain attributes of the patched modules that the unpatched model does not read."""
    found = {type(m): set(own_attributes(m)) for m in belonging(model)}

    def watching(kind):
        def read(self, name):
            found[kind].discard(name)
            return object.__getattribute__(self, name)

        return mock.patch.object(kind, "__getattribute__", read)

    with contextlib.ExitStack() as stack:
        for kind in found:
            stack.enter_context(watching(kind))
        assert not isinstance(model.run(copy.deepcopy(model.model)), Exception)
    return found


def belonging(model):
    """The patched modules and the transformers modules inside them."""

    def within(name, module):
        yield module
        for child_name, child in module.named_children():
            inside = f"{name}.{child_name}".lstrip(".")
            if inside not in model.served and not isinstance(child, transformers.PreTrainedModel):
                yield from within(inside, child)

    for name in model.names:
        for module in within(name, model.model.get_submodule(name)):
            if type(module).__module__.startswith("transformers."):
                yield module


def own_attributes(module):
    return (n for n in vars(module) if not n.startswith("_") and n != "training")
