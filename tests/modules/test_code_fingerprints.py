"""Fingerprints of code: equal for equivalent code, different for any change."""

import ast
import importlib
import inspect
import sys

import pytest
import transformers

from tests.tools import releases
from vlm_fast.modules.parameter_access import code_fingerprints

SOURCE = '''
import functools
class Layer:
    """A layer."""
    def forward(self, x: int, scale=2.0):
        """What it gives."""
        # a remark
        return [x * scale for x in (x, self.y)]
'''
SAME = {
    "comments": ("# a remark", "# another"),
    "docstring": ('"""What it gives."""', '"""Something\n        else."""'),
    "no docstring": ('        """What it gives."""\n', ""),
    "annotations": ("x: int", "x"),
    "spaces": ("x * scale", "x *  scale"),
}
OTHER = {
    "parameter": ("x: int, scale", "x: int, factor=1, scale"),
    "default": ("scale=2.0", "scale=3.0"),
    "result": ("[x * scale for x in (x, self.y)]", "([x * scale for x in (x, self.y)],)"),
    "attribute": ("self.y", "self.z"),
    "operator": ("x * scale", "x / scale"),
    "decorator": ("    def forward", "    @functools.cache\n    def forward"),
}


def forward_of(source, tmp_path, name):
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Layer.forward


@pytest.mark.parametrize("change", SAME)
def test_equivalent_code_has_the_same_fingerprint(change, tmp_path):
    before = code_fingerprints.fingerprint(forward_of(SOURCE, tmp_path, "before"))
    after = forward_of(SOURCE.replace(*SAME[change]), tmp_path, "after")
    assert before is not None and code_fingerprints.fingerprint(after) == before


@pytest.mark.parametrize("change", OTHER)
def test_different_code_has_another_fingerprint(change, tmp_path):
    before = code_fingerprints.fingerprint(forward_of(SOURCE, tmp_path, "before"))
    after = code_fingerprints.fingerprint(
        forward_of(SOURCE.replace(*OTHER[change]), tmp_path, "after")
    )
    assert after not in (before, None)


def test_code_that_differs_from_its_file_has_no_fingerprint(tmp_path):
    forward = forward_of(SOURCE, tmp_path, "before")
    forward.__code__ = forward_of(SOURCE.replace("*", "/"), tmp_path, "after").__code__.replace(
        co_filename=forward.__code__.co_filename
    )
    assert code_fingerprints.fingerprint(forward) is None


def test_code_without_a_file_has_no_fingerprint(tmp_path):
    forward = forward_of(SOURCE, tmp_path, "before")
    (tmp_path / "before.py").unlink()
    code_fingerprints._source.cache_clear()
    assert code_fingerprints.fingerprint(forward) is None


def test_only_transformers_models_are_checked():
    assert code_fingerprints.name_of(ast.NodeVisitor, "visit") is None
    assert (
        code_fingerprints.why_not_known_code(ast.NodeVisitor, "visit", ast.NodeVisitor.visit)
        is None
    )


@pytest.mark.skipif(
    transformers.__version__ not in releases.RELEASES,
    reason=f"transformers {transformers.__version__} was not read",
)
def test_methods_of_installed_release_have_recorded_fingerprints():
    found = 0
    for name in code_fingerprints.KNOWN:
        home, kind, method = name.rsplit(".", 2)
        try:
            module = importlib.import_module(f"transformers.{home}")
        except ImportError:
            continue  # code of another release
        definer = getattr(module, kind, None)
        if definer is not None and method in vars(definer):
            assert (
                code_fingerprints.why_not_known_code(definer, method, vars(definer)[method]) is None
            )
            found += 1
    assert found > 50


def test_reason_names_method_and_release(monkeypatch):
    from transformers.models.idefics.modeling_idefics import IdeficsMLP

    forward = inspect.unwrap(IdeficsMLP.forward)
    monkeypatch.setattr(sys.modules[code_fingerprints.__name__], "KNOWN", {})
    reason = code_fingerprints.why_not_known_code(IdeficsMLP, "forward", forward)
    release = transformers.__version__
    assert reason == f"IdeficsMLP.forward of transformers {release} is not code that was read"
