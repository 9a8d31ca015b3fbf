"""The folders of transformers releases, and the tables of what is patched in each release."""

import importlib.metadata
import shutil

import pytest

from tests.support.families import CASES
from tests.tools import releases, releases_table
from tests.tools.releases import RELEASES, served

PINNED = "5.17.0"  # older releases are compared with its coverage
# Releases from here on serve all that the pinned one serves.
FULL = RELEASES[RELEASES.index("4.57.6") :]

# Cases that an older release does not serve although the pinned one does.
SOUNDS = "its older forwards merge sounds by themselves"
EXCEPTIONS = {
    "ovis2": "up to 5.8 its forward expands other masks too, and is not followed",
    "emu3": "up to 5.12 its forward hands on no pictures, so nothing is merged",
    **dict.fromkeys(["voxtral", "audioflamingo3", "musicflamingo", "glmasr"], SOUNDS),
}


@pytest.mark.parametrize("case", CASES)
def test_served_data_holds_all_cases_and_releases(case):
    assert list(served()[case]) == list(RELEASES)


@pytest.mark.parametrize("case", CASES)
def test_releases_serve_what_the_pinned_one_does_or_give_reason(case):
    cells = served()[case]
    full = set(releases_table.words(cells.get(PINNED)))
    for release, cell in cells.items():
        if cell["outcome"] in ("equal", "skipped"):
            short = full - set(releases_table.words(cell))
            assert not short or cell.get("skipped") or case in EXCEPTIONS, (release, short)
            assert not short or release not in FULL or case in EXCEPTIONS, (release, short, cell)
            if release in FULL and case not in EXCEPTIONS:
                for op, count in cells[PINNED].get("ops", {}).items():
                    assert cell["ops"].get(op, 0) >= count, (release, op, cell)


def test_tables_match_served_data():
    cells = served()
    text = releases_table.PAGE.read_text()
    for name, table in (
        ("releases", releases_table.page(cells)),
        ("families", releases_table.summary(cells)),
    ):
        assert releases_table.between(text, name, table) == text, f"make versions: {name}"


def test_release_table_row_is_spelled_in_words():
    found = {
        "4.49.0": {"outcome": "skipped", "served": [], "skipped": ["why"]},
        "5.8.1": {"outcome": "equal", "served": ["FusedMLP"], "skipped": ["why"]},
        "5.12.1": {"outcome": "equal", "served": ["FusedMLP"]},
        "5.20.2": {"outcome": "n/a", "why": "broken"},
        "5.24.0": {"outcome": "equal", "served": ["FusedMerge", "FusedMLP"]},
    }
    assert list(releases_table.spans(found)) == [
        "merge, projector from 5.24 on", "projector 5.8 to 5.12",
    ]  # fmt: skip
    row = releases_table.page({"llava": found}).splitlines()[2]
    assert row.count("projector") == 3 and "skipped (1)" in row and "n/a (2)" in row
    assert "?" in row  # cases that were not run are marked with a question mark


def test_written_cells_are_read_back(monkeypatch, tmp_path):
    cells = {"llava": {release: {"outcome": "-"} for release in RELEASES}}
    monkeypatch.setattr(releases, "SERVED", tmp_path / "served.json")
    assert releases.served() == {}
    releases.SERVED.write_text(releases.written(cells))
    assert releases.served() == cells


def test_wrong_results_are_not_written():
    cells = {"llava": {r: {"outcome": "-"} for r in ("5.8.1", "5.24.0")}}
    found = {"llava": {"outcome": "wrong", "why": "raises"}, "aria": {"outcome": "-"}}
    after = releases.merged(cells, {"release": "5.24.0", "cases": found})
    assert after == {"llava": {"5.8.1": {"outcome": "-"}}, "aria": {"5.24.0": {"outcome": "-"}}}


# ---- folders ----


class Pip:
    """A fake pip that writes distributions after a given number of failures."""

    def __init__(self, requires, failures=0):
        self.requires, self.failures, self.requested = requires, failures, []

    def __call__(self, path, *wanted):
        self.requested.append(wanted)
        for text in wanted:
            name, _, version = text.partition("==")
            info = path / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir(parents=True)
            lines = [f"Name: {name}", f"Version: {version}"]
            lines += [f"Requires-Dist: {line}" for line in self.requires.get(name, [])]
            (info / "METADATA").write_text("\n".join(lines) + "\n")
        if self.failures:
            self.failures -= 1
            raise KeyboardInterrupt


@pytest.fixture
def root(monkeypatch, tmp_path):
    monkeypatch.setattr(releases, "ROOT", tmp_path)
    return tmp_path


def test_install_adds_only_missing_requirements(root):
    torch = importlib.metadata.version("torch")
    pip = Pip(
        {
            "transformers": [
                f"torch=={torch}", "absent-one==2.0", "absent-two==3.0; extra == 'more'",
                "absent-three==1.0; python_version < '3'",
            ],
            "absent-one": ["ruff==0.1", "pytest>1"],
        }
    )  # fmt: skip
    releases.install("4.49.0", pip)
    assert pip.requested == [("transformers==4.49.0",), ("absent-one==2.0",), ("ruff==0.1",)]
    releases.install("4.49.0", pip)
    assert len(pip.requested) == 3


def test_install_replaces_folder_of_another_environment(root):
    pip = Pip({"transformers": ["absent-one==2.0"]})
    releases.install("4.49.0", pip)
    shutil.rmtree(
        releases.folder("4.49.0") / "absent_one-2.0.dist-info"
    )  # as if it was outside the environment
    releases.install("4.49.0", pip)
    assert pip.requested == 2 * [("transformers==4.49.0",), ("absent-one==2.0",)]


def test_install_names_requirements_pip_did_not_install(root):
    pip = Pip({"transformers": ["absent-one==2.0"]})
    with pytest.raises(RuntimeError, match="still lacks absent-one"):
        releases.install(
            "4.49.0", lambda path, *wanted: pip(path, *(wanted if not pip.requested else ()))
        )


def test_install_replaces_incomplete_folder(root):
    pip = Pip({"transformers": ["absent-one==2.0"]}, failures=1)
    with pytest.raises(KeyboardInterrupt):
        releases.install("4.49.0", pip)
    left = releases.folder("4.49.0")
    (left / "transformers").mkdir()  # without the marker of a complete installation
    assert not (left / "installed").exists()
    releases.install("4.49.0", pip)
    assert (left / "installed").exists() and not (left / "transformers").exists()
    assert pip.requested[1:] == [("transformers==4.49.0",), ("absent-one==2.0",)]
