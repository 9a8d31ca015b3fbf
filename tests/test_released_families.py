"""Every family under the installed release of transformers: equal to unpatched, or left alone.

`make test` runs this under several releases; docs/releases.md says what is served in which.
"""

import os

import pytest
import transformers

from tests.across_releases import examined
from tests.families import CASES
from tests.releases import RELEASES, served
from tests.releases_table import words

RELEASE = transformers.__version__
pytestmark = pytest.mark.skipif(
    RELEASE not in RELEASES, reason=f"no table holds transformers {RELEASE}"
)
QUICK = os.environ.get("VLM_FAST_THOROUGH") != "1"


@pytest.mark.parametrize("name", CASES)
def test_patched_as_unpatched(name):
    expected, found = served()[name].get(RELEASE), examined(name, quick=QUICK)
    assert expected is not None, "make versions has not written what is served"
    assert (found["outcome"] in ("-", "n/a")) == (expected["outcome"] in ("-", "n/a")), found
    assert set(words(found)) >= set(words(expected)), found
    for what in ("falls back", "not run"):
        assert set(found.get(what, [])) <= set(expected.get(what, [])), found
