"""Translates Python annotations into the types of a torch op schema."""

from __future__ import annotations

from inspect import Signature
from types import UnionType
from typing import Any, Union, get_args, get_origin

from torch import Tensor


def holds_list(annotation: Any) -> bool:
    """Whether an annotation is a list of tensors, or a tensor or such a list."""
    if get_origin(annotation) in (Union, UnionType):
        return any(holds_list(a) for a in get_args(annotation))
    return get_origin(annotation) is not None and Tensor in get_args(annotation)


def schema_type(annotation: Any) -> str:
    """The schema type of an annotation; ``Tensor | list[Tensor]`` gives a list."""
    if holds_list(annotation):
        return "Tensor[]"
    if get_origin(annotation) in (Union, UnionType):
        kinds = [a for a in get_args(annotation) if a is not type(None)]
        return schema_type(kinds[0]) + "?"
    words = {Tensor: "Tensor", str: "str", float: "float", int: "SymInt", bool: "bool"}
    return words[annotation]


def script_schema(name: str, signature: Signature, results: int) -> str:
    """The schema ``name(...)`` of a Python signature with its defaults, for torch.jit.script."""
    written: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in written:
            written.append("*")
        argument = f"{schema_type(parameter.annotation)} {parameter.name}"
        if isinstance(parameter.default, str):
            argument += f'="{parameter.default}"'
        elif parameter.default is not parameter.empty:
            argument += f"={parameter.default}"
        written.append(argument)
    returned = ", ".join(["Tensor"] * results)
    returned = returned if results == 1 else f"({returned})"
    return f"{name}({', '.join(written)}) -> {returned}"
