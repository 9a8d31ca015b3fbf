"""Every family under the installed transformers release: equal to unpatched, or not patched.

`make test` runs this under the pinned release and `make test-slow` under three more;
docs/releases.md lists what is patched in each release.
"""

import pytest
import transformers

from tests.support.across_releases import FEW, QUICK, examine_family
from tests.support.families import CASES
from tests.support.selection import REPRESENTATIVES, slow_except
from tests.tools.releases import RELEASES, served
from tests.tools.releases_table import words

RELEASE = transformers.__version__
OTHERS = ("blip_2", "idefics", "mllama", "idefics2", "kosmos2", "perception_lm")
pytestmark = pytest.mark.skipif(
    RELEASE not in RELEASES, reason=f"no table holds transformers {RELEASE}"
)


def ways(name):
    """The ways to run a case; fewer if an earlier family is patched in the same way."""
    served_as = [cells.get(RELEASE, {}).get("served") for cells in served().values()]
    place = list(served()).index(name)
    return FEW if served_as[place] in served_as[:place] else QUICK


@pytest.mark.parametrize("name", slow_except((*REPRESENTATIVES, *OTHERS), CASES))
def test_patched_matches_unpatched(name):
    expected, found = served()[name].get(RELEASE), examine_family(name, ways(name))
    assert expected is not None, "make versions has not written what is served"
    assert (found["outcome"] in ("-", "n/a")) == (expected["outcome"] in ("-", "n/a")), found
    assert set(words(found)) >= set(words(expected)), found
    for op, count in expected.get("ops", {}).items():
        assert found.get("ops", {}).get(op, 0) >= count, (op, found)
    for what in ("falls back", "not run"):
        assert set(found.get(what, [])) <= set(expected.get(what, [])), found
