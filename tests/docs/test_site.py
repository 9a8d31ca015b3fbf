"""The documentation site: the API page has every public name; mkdocs builds without warnings."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_layout import public_names

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def api_names():
    """Names of the functions and classes on docs/api.md, as the mkdocs hook writes them."""
    spec = importlib.util.spec_from_file_location("api_names", DOCS / "api_names.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return re.findall(r"^::: (\S+)$", hook.expanded((DOCS / "api.md").read_text()), re.MULTILINE)


def test_api_page_has_all_public_names():
    found = set()
    for path in api_names():
        module, _, name = path.rpartition(".")
        found.add(id(getattr(importlib.import_module(module), name)))
    missing = [name for name, value in public_names() if id(value) not in found]
    assert not missing


def test_navigation_has_all_pages():
    named = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert named == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocstrings") is None, reason="needs the extra docs: make docs"
)
def test_site_builds_without_warnings(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
