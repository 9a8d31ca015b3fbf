"""The folders of transformers releases, and the tables of what is patched in each release."""

import pytest

from tests.support.families import CASES
from tests.tools import releases_table
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


# ---- folders ----
