"""A hook of mkdocs: on docs/api.md, ``[[ package ]]`` becomes the public names of a package.

Public names are those that the ``__init__.py`` of the package imports as themselves (``a as a``),
and its own functions and classes. The source is read, so building the site imports nothing.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def public_names(package: str) -> list[str]:
    """Where each public name of a package is defined, as a dotted path; packages are left out."""
    source = (ROOT / package.replace(".", "/") / "__init__.py").read_text()
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            folder = ROOT / node.module.replace(".", "/")
            for alias in node.names:
                if alias.asname == alias.name and not (folder / alias.name).is_dir():
                    names.append(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            names.append(f"{package}.{node.name}")
    return names


def expanded(markdown: str) -> str:
    """The page with each ``[[ package ]]`` replaced by directives of mkdocstrings."""

    def directives(match: re.Match[str]) -> str:
        return "\n\n".join(f"::: {name}" for name in public_names(match[1]))

    return re.sub(r"^\[\[ ([\w.]+) \]\]$", directives, markdown, flags=re.MULTILINE)


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    """What mkdocs calls for each page."""
    return expanded(markdown)
