"""The page of guarantees has every row of the matrix that it promises, and tests that exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "guarantees.md"
ROWS = ["W1", "W2", "W3", "T5", "T6"]
ROWS += [f"G{i}" for i in range(1, 11)] + [f"D{i}" for i in range(1, 7)]


def rows():
    """The names of tests in each row, with the file before them."""
    table = PAGE.read_text().split("<!-- rows:begin -->")[1].split("<!-- rows:end -->")[0]
    for line in table.strip().splitlines()[2:]:
        row, _, tests = (cell.strip() for cell in line.strip().strip("|").split(" | "))
        file, named = None, []
        for name in re.findall(r"`([^`]+)`", tests):
            if name.endswith(".py"):
                file = name
            elif file is not None and re.fullmatch(r"[a-z]\w+_\w+", name):
                named.append((file, name))
        yield row, named


def functions(file):
    return [n.name for n in ast.parse((TESTS / file).read_text()).body if hasattr(n, "name")]


def test_every_row_is_there():
    assert [row for row, _ in rows()] == ROWS
    assert all(named for row, named in rows())


@pytest.mark.parametrize("row", ROWS)
def test_the_tests_of_a_row_exist(row):
    for file, name in dict(rows())[row]:
        assert name in functions(file), f"{PAGE.name}, row {row}: {file} has no {name}"
        if not name.startswith("test_"):  # one of the checks that a test runs on ranks
            assert (TESTS / file).read_text().count(name) > 1, f"{name} is not run"
