"""Is the code of a method of transformers one of the versions that this package was checked with?

A fused op replaces a method of some releases of transformers. ``code_fingerprints.json`` holds the
fingerprints of that method's code in those releases. Another release is supported where its code
has the same fingerprint: a hash of the syntax tree, without comments, docstrings and annotations.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

PATH = Path(__file__).with_name("code_fingerprints.json")
# For each method, named by `name_of`, the fingerprints of its code in the checked releases.
KNOWN: dict[str, list[str]] = json.loads(PATH.read_text())

_IGNORED_FIELDS = {"annotation", "returns", "ctx", "kind", "type_comment", "type_params"}


def name_of(definer: type, method: str) -> str | None:
    """The key of a method in ``KNOWN``; None if it is not a model or activation of transformers."""
    home, _, path = definer.__module__.partition(".")
    covered = path.startswith("models.") or path == "activations"
    return f"{path}.{definer.__name__}.{method}" if home == "transformers" and covered else None


def why_not_known_code(definer: type, method: str, function: Any) -> str | None:
    """Why a method of transformers has no known fingerprint; None for known and foreign methods."""
    name = name_of(definer, method)
    if name is None:
        return None
    found = fingerprint(function)
    if found is not None and found in KNOWN.get(name, ()):
        return None
    release = getattr(sys.modules.get("transformers"), "__version__", "")
    what = f"{definer.__name__}.{method} of transformers {release}"
    return f"{what} has no source" if found is None else f"{what} is not code that was read"


def fingerprint(function: Any) -> str | None:
    """The fingerprint of a method; None if it has no source, or runs other code than its source."""
    function = inspect.unwrap(function)
    kind, _, method = function.__qualname__.rpartition(".")
    try:
        tree, code = _source(function.__code__.co_filename)
    except (OSError, SyntaxError, ValueError):
        return None
    definition = definition_of(tree, kind, method)
    compiled = _constant(_constant(code, kind), method)
    if definition is None or compiled is None or not _alike(compiled, function.__code__):
        return None
    return fingerprint_of_source(definition)


@functools.lru_cache(maxsize=8)  # a model's classes lie in a few files
def _source(path: str) -> tuple[ast.Module, CodeType]:
    tree = ast.parse(Path(path).read_text(encoding="utf8"))
    return tree, compile(tree, path, "exec", dont_inherit=True)


def definition_of(tree: ast.Module, kind: str, method: str) -> ast.FunctionDef | None:
    """The definition of a method in the syntax tree of a module, or None."""
    for found in tree.body:
        if isinstance(found, ast.ClassDef) and found.name == kind:
            for definition in found.body:
                if isinstance(definition, ast.FunctionDef) and definition.name == method:
                    return definition
    return None


def _constant(code: CodeType | None, name: str) -> CodeType | None:
    """The code object that is defined under this name in the code of a module or a class."""
    found = [] if code is None else [c for c in code.co_consts if isinstance(c, CodeType)]
    return next((c for c in found if c.co_name == name), None)


def fingerprint_of_source(definition: ast.FunctionDef) -> str:
    """The fingerprint of a function definition."""
    return hashlib.sha256("\n".join(_tokens(definition)).encode()).hexdigest()[:16]


def _tokens(node: ast.AST) -> Iterator[str]:
    yield type(node).__name__
    for field, value in ast.iter_fields(node):
        if field in _IGNORED_FIELDS:
            continue
        if field == "body" and isinstance(value, list) and _is_docstring(value[0]):
            value = value[1:]
        yield field
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.AST):
                yield from _tokens(item)
            else:
                yield repr(item)


def _is_docstring(node: ast.AST) -> bool:
    constant = node.value if isinstance(node, ast.Expr) else None
    return isinstance(constant, ast.Constant) and isinstance(constant.value, str)


def _alike(one: CodeType, other: CodeType) -> bool:
    same = (
        one.co_code == other.co_code
        and one.co_names == other.co_names
        and one.co_varnames == other.co_varnames
        and one.co_freevars == other.co_freevars
        and len(one.co_consts) == len(other.co_consts)
    )
    return same and all(
        _alike(a, b) if isinstance(a, CodeType) and isinstance(b, CodeType) else repr(a) == repr(b)
        for a, b in zip(one.co_consts, other.co_consts, strict=True)
    )
