"""Edits transformers classes into forms that a future release may have.

`File` edits methods in the text of a modeling file, compiles them from there, and puts them in the
place of the originals. Module, names, file and lines are those of the originals, also for
``inspect.getsource``: they look like transformers' own.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import linecache
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import transformers
from transformers.utils.deprecation import deprecate_kwarg

Edit = tuple[int, int, int, str]  # line, its first and last byte, and what stands there instead
LATER = "_of_later"


class File:
    """A modeling file of transformers and its text."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.path = module, str(module.__file__)
        self.lines = Path(self.path).read_text(encoding="utf8").splitlines(keepends=True)
        self.methods = dict(_methods(ast.parse("".join(self.lines))))

    def parameters(self, kind: str, name: str) -> list[str]:
        given = self.methods[kind, name].args
        return [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)][1:]

    def renamed(self, parameter: str, kind: str, name: str) -> list[Edit]:
        """Rename a parameter of one method, in its signature and body."""
        return list(self._names(self.methods[kind, name], parameter))

    def renamed_everywhere(self, parameter: str) -> list[Edit]:
        """Rename a parameter in all methods of the file and in calls between them."""
        edits = []
        for method in self.methods.values():
            edits += self._names(method, parameter)
            for call in ast.walk(method):
                if isinstance(call, ast.Call) and not self._is_imported(call.func):
                    for keyword in call.keywords:
                        if keyword.arg == parameter:
                            edits.append(_renaming(keyword, parameter))
        return edits

    def other_returns(self, kind: str, name: str) -> list[Edit]:
        """Return a one-element tuple in place of a value, or the first element of a tuple."""
        edits: list[Edit] = []
        for value in _returned(self.methods[kind, name]):
            before, after = ("(", ")[0]") if isinstance(value, ast.Tuple) else ("(", ",)")
            edits.append((value.lineno, value.col_offset, value.col_offset, before))
            edits.append((value.end_lineno, value.end_col_offset, value.end_col_offset, after))
        return edits

    def returning_a_tuple(self, kind: str) -> list[Edit]:
        """Make a forward return a one-element tuple, and unpack it at all its calls."""
        edits = self.other_returns(kind, "forward")
        first = (
            f"(lambda m: (lambda *a, **k: m(*a, **k)[0]) if type(m).__name__ == {kind!r} else m)("
        )
        for method in self.methods.values():
            for call in ast.walk(method):
                plain = isinstance(call, ast.Call) and not any(
                    isinstance(n, ast.Call) for n in ast.walk(call.func)
                )
                if plain and not self._is_imported(call.func):
                    f = call.func
                    edits.append((f.lineno, f.col_offset, f.col_offset, first))
                    edits.append((f.end_lineno, f.end_col_offset, f.end_col_offset, ")"))
        return edits

    def _names(self, method: ast.FunctionDef, name: str) -> Iterator[Edit]:
        # Until Python 3.12 names inside of f-strings have other places.
        formatted = {
            n for f in ast.walk(method) if isinstance(f, ast.JoinedStr) for n in ast.walk(f)
        }
        for node in ast.walk(method):
            given = node.arg if isinstance(node, ast.arg) else getattr(node, "id", None)
            if given == name and node not in formatted:
                yield _renaming(node, name)

    def _is_imported(self, callee: ast.expr) -> bool:
        found = vars(self.module).get(callee.id) if isinstance(callee, ast.Name) else None
        return found is not None and getattr(found, "__module__", None) != self.module.__name__

    @contextlib.contextmanager
    def changed(self, edits: Iterable[Edit], renamed: str | None = None) -> Iterator[None]:
        """Context manager in which the methods that these edits touch are changed.

        Whole models still take a parameter that was ``renamed`` under its old name too, for they
        are called from other files.
        """
        lines = list(self.lines)
        edits = set(edits)
        for line, start, end, text in sorted(edits, reverse=True):
            raw = lines[line - 1].encode()
            lines[line - 1] = (raw[:start] + text.encode() + raw[end:]).decode()
        touched = {line for line, *_ in edits}
        linecache.getlines(self.path)
        entry = (sum(map(len, lines)), None, lines, self.path)  # with no time: it stays
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(linecache.cache, {self.path: entry}))
            for kind, method, function in self._compiled("".join(lines), touched):
                if renamed is not None and issubclass(kind, transformers.PreTrainedModel):
                    new = renamed + LATER
                    if new in inspect.signature(function).parameters:
                        function = deprecate_kwarg(renamed, version="99.0", new_name=new)(function)
                stack.enter_context(mock.patch.object(kind, method, function))
            yield

    def _compiled(self, text: str, touched: set[int]) -> Iterator[tuple[type, str, Any]]:
        """Compile the methods with a changed line inside classes that contain nothing else."""
        tree, holders = ast.parse(text), []
        for holder in tree.body:
            if isinstance(holder, ast.ClassDef):
                one = ast.Module([holder], [])
                own = [node for _, node in _methods(one)]
                holder.body = [node for node in own if not touched.isdisjoint(_lines(node))]
                holder.bases, holder.keywords, holder.decorator_list = [], [], []
                holders += [holder] if holder.body else []
        for holder in holders:
            for method in holder.body:
                method.decorator_list = [
                    d for d in method.decorator_list if "docstring" not in ast.unparse(d)
                ]
        tree.body = holders
        made: dict[str, Any] = {}
        exec(compile(tree, self.path, "exec"), vars(self.module), made)
        for holder in holders:
            kind = vars(self.module)[holder.name]
            for node in holder.body:
                function = vars(made[holder.name])[node.name]
                plain = inspect.unwrap(function)
                cells = zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True)
                for name, cell in cells:
                    if name == "__class__":  # which super() asks
                        cell.cell_contents = kind
                yield kind, node.name, function


def _lines(node: Any) -> range:
    return range(node.lineno, node.end_lineno + 1)


def _methods(tree: ast.Module) -> Iterator[tuple[tuple[str, str], ast.FunctionDef]]:
    """Methods by class and name, without static and class methods."""
    for kind in tree.body:
        for node in kind.body if isinstance(kind, ast.ClassDef) else []:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
                continue
            if [a.arg for a in node.args.args[:1]] == ["self"]:
                yield (kind.name, node.name), node


def _renaming(node: Any, name: str) -> Edit:
    return node.lineno, node.col_offset, node.col_offset + len(name), name + LATER


def _returned(node: ast.AST) -> Iterator[Any]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            yield from [] if child.value is None else [child.value]
        elif not isinstance(child, (ast.FunctionDef, ast.Lambda)):
            yield from _returned(child)
