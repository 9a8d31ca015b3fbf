"""Completes the docstring of an op with the shapes, dtypes and errors of its declaration."""

from __future__ import annotations

import inspect
import re
import textwrap

from vlm_fast.ops.signature import Signature
from vlm_fast.ops.signature_arguments import TensorArgument

SECTIONS = ("Args:", "Returns:", "Raises:")
RAISED = {
    "TypeError": "an argument is not a tensor, or has a dtype that is not declared.",
    "ValueError": "shapes do not match, devices differ, or an option is out of range.",
}


def documented(text: str, signature: Signature) -> str:
    """The docstring with a line for every argument and the errors that a signature raises.

    The ``Args:`` section of ``text`` says what the declaration cannot; an argument that it leaves
    out gets only its declaration. ``Raises:`` is completed in the same way.
    """
    parts = _sections(inspect.cleandoc(text))
    lines = [parts[""].rstrip(), "", "Args:"]
    described = _entries(parts.get("Args:", ""))
    for name, declared in signature.tensors.items():
        lines.append(_entry(name, _words(declared), described.pop(name, "")))
    for name in signature.option_names:
        option = signature.options.get(name)
        lines.append(_entry(name, f"{option.words}" if option else "", described.pop(name, "")))
    if described:
        raise ValueError(
            f"{signature.op}: the docstring describes {', '.join(described)}, no arguments"
        )
    if "Returns:" in parts:
        lines += ["", "Returns:", parts["Returns:"].rstrip()]
    raised = _entries(parts.get("Raises:", ""))
    lines += ["", "Raises:"]
    for error in (*RAISED, *(e for e in raised if e not in RAISED)):
        lines.append(_entry(error, RAISED.get(error, ""), raised.get(error, "")))
    return "\n".join(lines) + "\n"


def _words(declared: TensorArgument | list[TensorArgument]) -> str:
    if isinstance(declared, TensorArgument):
        return declared.words
    return "; ".join(f"{argument.name}: {argument.words}" for argument in declared)


def _entry(name: str, declared: str, described: str) -> str:
    sentences = [s if s.endswith(".") else f"{s}." for s in (declared, described) if s]
    text = f"{name}: {' '.join(sentences)}"
    return textwrap.fill(
        text, 100, initial_indent="    ", subsequent_indent="        ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _sections(text: str) -> dict[str, str]:
    """The text before the first section under "", then each section under its title."""
    parts, title = {"": ""}, ""
    for line in text.splitlines():
        if line in SECTIONS:
            title = line
            parts[title] = ""
        elif title and line and not line.startswith(" "):
            raise ValueError(f"{line!r} stands after the sections of a docstring")
        else:
            parts[title] += line + "\n"
    return parts


def _entries(text: str) -> dict[str, str]:
    """``name: description`` of a section, each description on one line."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(text).splitlines():
        match = re.match(r"(\w+): (.*)", line)
        if match:
            name = match[1]
            found[name] = match[2]
        elif line.strip():
            found[name] += " " + line.strip()
    return found
