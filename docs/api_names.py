"""A hook of mkdocs: on docs/api.md, the line ``[[ package ]]`` becomes all public names of a package.

Public names are those that the package's ``__init__.py`` imports as themselves (``a as a``), and its
own functions. They are read from the source, so building the site imports nothing.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def public_names(package: str) -> list[str]:
    """The public names of a package, in the order of its ``__init__.py``; packages are left out."""
    source = (ROOT / package.replace(".", "/") / "__init__.py").read_text()
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom):
            folder = ROOT / (node.module or "").replace(".", "/")
            for alias in node.names:
                is_package = (folder / alias.name).is_dir()
                if alias.asname == alias.name and not is_package:
                    names.append(alias.name)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            names.append(node.name)
    return names


def expanded(markdown: str) -> str:
    """The page with each ``[[ package ]]`` replaced by a directive of mkdocstrings for each name."""

    def directives(match: re.Match[str]) -> str:
        package = match[1]
        return "\n\n".join(f"::: {package}.{name}" for name in public_names(package))

    return re.sub(r"^\[\[ ([\w.]+) \]\]$", directives, markdown, flags=re.MULTILINE)


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    return expanded(markdown)
