"""Reads from source code what transformers' ``get_placeholder_mask`` and ``forward`` do.

It is independent of the package's own reader: it goes through the statements one by one and
stops at the first unknown one.
"""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import transformers


class Unknown(Exception):
    """The source contains code that this reader does not understand."""


class Mask(NamedTuple):
    """A mask of one token id, with shape (B, T), (B, T, 1) or (B, T, hidden)."""

    id: str
    shape: str


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


def tree(function):
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    return ast.parse(source).body[0]


def read_masks(method):
    """Token ids of the masks, the id that each feature argument is counted by, the mask shape."""
    function = tree(method)
    features = {a.arg for a in function.args.args if a.arg.endswith("features")}
    tokens = {a.arg for a in function.args.args if a.arg.endswith("token_id")}
    if function.args.vararg or function.args.kwarg or not features:
        raise Unknown("arguments")
    if [a.arg for a in function.args.args[:3]] != ["self", "input_ids", "inputs_embeds"]:
        raise Unknown("arguments")
    if len(function.args.args) != 3 + len(features) + len(tokens):
        raise Unknown("arguments")
    reader = _Reader(features, tokens)
    reader.run(function.body)
    masks = reader.answer
    shapes = {mask.shape for mask in masks}
    if reader.counted.keys() != features or len(shapes) != 1 or shapes == {"two"}:
        raise Unknown("its answer")
    return tuple(mask.id for mask in masks), reader.counted, shapes == {"hidden"}


class _Reader:
    """Interprets a method symbolically, with a value for each name."""

    def __init__(self, features, tokens):
        self.features, self.tokens = features, tokens
        self.values, self.counted, self.answer = {}, {}, None

    def run(self, statements):
        for statement in statements:
            self.step(statement)

    def step(self, node):
        match node:
            case ast.Expr(ast.Constant()):
                pass
            case ast.If(ast.Compare(ast.Name("input_ids"), [ast.Is()], [ast.Constant(None)])):
                self.run(node.orelse)
            case ast.If(ast.Compare(ast.Name(name), [ast.IsNot()], [ast.Constant(None)])):
                if name not in self.features or node.orelse:
                    raise Unknown(ast.unparse(node.test))
                self.run(node.body)
            case ast.If(test, [*words, ast.Raise()], []) if all(
                isinstance(word, ast.Assign) for word in words
            ):
                if isinstance(test, ast.BoolOp):  # features are given, and
                    test = test.values[-1]
                self.count(test, ast.NotEq)
            case ast.Expr(ast.Call(ast.Name("torch_compilable_check"), [condition, _])):
                self.count(condition, ast.Eq)
            case ast.Assign([ast.Name(name)], value):
                self.values[name] = self.value(value)
            case ast.Return(value):
                made = value.elts if isinstance(value, ast.Tuple) else [value]
                self.answer = [self.value(v) for v in made]
                if not all(isinstance(mask, Mask) for mask in self.answer):
                    raise Unknown(ast.unparse(node))
            case _:
                raise Unknown(ast.unparse(node))

    def count(self, test, how):
        match test:
            case ast.Compare(left, [operator], [right]) if isinstance(operator, how):
                match self.value(left), self.value(right):
                    case ("elements of embeds", id_), ("elements of", name):
                        self.counted[name] = id_
                        return
        raise Unknown(ast.unparse(test))

    def value(self, node):
        match node:
            case ast.Name(name):
                return self.values.get(name, name)
            case ast.Compare(ast.Name("input_ids"), [ast.Eq()], [number]):
                name = ast.unparse(number)
                if name in self.tokens or (name.startswith("self.") and name.endswith("token_id")):
                    return Mask(name.removeprefix("self."), "two")
            case ast.BinOp(left, ast.Mult(), right):
                if ast.unparse(right) == "inputs_embeds.shape[-1]":
                    match self.value(left):
                        case "tokens of", id_:
                            return "elements of embeds", id_
            case ast.Call(ast.Attribute(of, name), arguments):
                return self.call(node, of, name, [ast.unparse(a) for a in arguments])
        return f"({ast.unparse(node)})"

    def call(self, node, of, name, arguments):
        match self.value(of), name, arguments:
            case Mask(id_, "two"), "unsqueeze", ["-1"]:
                return Mask(id_, "one")
            case Mask(id_, "one"), "expand_as", ["inputs_embeds"]:
                return Mask(id_, "hidden")
            case Mask() as mask, "to", ["inputs_embeds.device"]:
                return mask
            case Mask(id_, "two"), "sum", []:
                return "tokens of", id_
            case str(features), "flatten", ["0", "1"] if features in self.features:
                return features
            case str(features), "numel", [] if features in self.features:
                return "elements of", features
        match of:
            case ast.Subscript(ast.Name("inputs_embeds"), mask) if name == "numel":
                match self.value(mask):
                    case Mask(id_, "two" | "hidden"):
                        return "elements of embeds", id_
        return f"({ast.unparse(node)})"


def follow_masks(forward):
    """The number of masks that a forward merges by; raises `Unknown` for other uses of a mask."""
    merged, waiting = 0, set()
    for node in _statements(tree(forward).body):
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & waiting
        match node:
            case ast.Assign([target], ast.Call(ast.Attribute(_, "get_placeholder_mask"))):
                if waiting:
                    raise Unknown(f"{waiting} not merged")
                waiting = {n.id for n in ast.walk(target) if isinstance(n, ast.Name)} - {"_"}
            case ast.Assign([ast.Name(name)], ast.Call(ast.Attribute(ast.Name(same), "to"))) if (
                name == same and name in waiting
            ):
                pass
            case ast.Assign(_, ast.Call(ast.Attribute(_, "masked_scatter"), [ast.Name(name), _])):
                merged += name in waiting
                waiting -= {name}
            case _ if names:
                raise Unknown(ast.unparse(node))
    if waiting:
        raise Unknown(f"{waiting} not merged")
    return merged


def _statements(body):
    for node in body:
        inside = [getattr(node, name, []) for name in ("body", "orelse")]
        if any(inside):
            for statements in inside:
                yield from _statements(statements)
        else:
            yield node
