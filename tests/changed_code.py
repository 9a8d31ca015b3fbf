"""Classes of transformers as a release that does not exist yet may have them.

`Code` edits one method of a class in the text of its file, compiles it from there, and puts it in
the place of the original. Module, names, file and lines are those of the original, also for
``inspect.getsource``: it looks like transformers' own.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import linecache
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

Edit = tuple[int, int, int, str]  # line, its first and last byte, and what stands there instead


class Code:
    """One method of a class, as its file has it."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind = next(base for base in kind.__mro__ if name in vars(base))
        self.name, self.module = name, sys.modules[self.kind.__module__]
        self.path = str(self.module.__file__)
        self.lines = Path(self.path).read_text(encoding="utf8").splitlines(keepends=True)
        self.node = self._function(ast.parse("".join(self.lines)))

    def _class(self, tree: ast.Module) -> ast.ClassDef:
        named = (n for n in tree.body if isinstance(n, ast.ClassDef))
        return next(n for n in named if n.name == self.kind.__name__)

    def _function(self, tree: ast.Module) -> ast.FunctionDef:
        named = (n for n in self._class(tree).body if isinstance(n, ast.FunctionDef))
        return next(n for n in named if n.name == self.name)

    @property
    def parameters(self) -> list[str]:
        given = self.node.args
        return [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)][1:]

    def renamed(self, parameter: str) -> list[Edit]:
        """The parameter with another name, in the signature and wherever it is read."""
        inside = {
            n for f in ast.walk(self.node) if isinstance(f, ast.JoinedStr) for n in ast.walk(f)
        }
        edits = []
        for node in ast.walk(self.node):
            found = isinstance(node, ast.arg) and node.arg == parameter
            found |= isinstance(node, ast.Name) and node.id == parameter and node not in inside
            if found:
                start = node.col_offset
                edits.append((node.lineno, start, start + len(parameter), f"{parameter}_of_later"))
        return edits

    def other_returns(self) -> list[Edit]:
        """A tuple of one where there was none, and the first where there was a tuple."""
        edits = []
        for node in self._returns(self.node):
            value = node.value
            if value is None:
                continue
            before, after = ("(", ")[0]") if isinstance(value, ast.Tuple) else ("(", ",)")
            edits.append((value.lineno, value.col_offset, value.col_offset, before))
            edits.append((value.end_lineno, value.end_col_offset, value.end_col_offset, after))
        return edits

    def _returns(self, node: ast.AST) -> Iterator[Any]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Return):
                yield child
            elif not isinstance(child, (ast.FunctionDef, ast.Lambda)):
                yield from self._returns(child)

    @contextlib.contextmanager
    def changed(self, edits: list[Edit]) -> Iterator[None]:
        """Within it the class has the method with these edits."""
        lines = list(self.lines)
        for line, start, end, text in sorted(edits, reverse=True):
            raw = lines[line - 1].encode()
            lines[line - 1] = (raw[:start] + text.encode() + raw[end:]).decode()
        linecache.getlines(self.path)
        entry = (
            sum(map(len, lines)),
            None,
            lines,
            self.path,
        )  # without a time it is not read again
        with (
            mock.patch.dict(linecache.cache, {self.path: entry}),
            mock.patch.object(self.kind, self.name, self._compiled("".join(lines))),
        ):
            yield

    def _compiled(self, text: str) -> Any:
        tree = ast.parse(text)
        holder, function = self._class(tree), self._function(tree)
        holder.bases, holder.keywords, holder.decorator_list = [], [], []
        holder.body, tree.body = [function], [holder]
        made: dict[str, Any] = {}
        exec(compile(tree, self.path, "exec"), vars(self.module), made)
        method = vars(made[self.kind.__name__])[self.name]
        plain = inspect.unwrap(method)
        for name, cell in zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True):
            if name == "__class__":  # which super() asks
                cell.cell_contents = self.kind
        return method
