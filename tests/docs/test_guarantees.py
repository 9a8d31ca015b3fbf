"""Every row of the table in docs/guarantees.md names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "guarantees.md"


def rows():
    """Yield the title of each row and its tests as pairs of file and name."""
    table = PAGE.read_text().split("<!-- rows:begin -->")[1].split("<!-- rows:end -->")[0]
    for line in table.strip().splitlines()[2:]:
        title, tests = (cell.strip() for cell in line.strip().strip("|").split(" | "))
        file, named = None, []
        for name in re.findall(r"`([^`]+)`", tests):
            if name.endswith(".py"):
                file = name
            elif file is not None and re.fullmatch(r"[a-z]\w+_\w+", name):
                named.append((file, name))
        yield title, named


ROWS = dict(rows())


def functions(file):
    return [n.name for n in ast.parse((TESTS / file).read_text()).body if hasattr(n, "name")]


def test_row_titles_are_unique_and_rows_name_tests():
    assert len(ROWS) == len(list(rows())) >= 20
    assert all(ROWS.values())


@pytest.mark.parametrize("title", ROWS)
def test_tests_named_in_row_exist(title):
    for file, name in ROWS[title]:
        assert name in functions(file), f"{PAGE.name}, {title}: {file} has no {name}"
        if not name.startswith("test_"):  # a function that a test of the same file runs on ranks
            assert (TESTS / file).read_text().count(name) > 1, f"{name} is not run"
