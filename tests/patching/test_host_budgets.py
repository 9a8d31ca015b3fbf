"""What the host does in a call of a patched connector stays within its budget."""

import json

import pytest

from tests.support import stub_gpu
from tests.support.selection import slow_except
from tests.tools import host_budgets

BUDGETS = json.loads(host_budgets.CONNECTORS_FILE.read_text())
SAME_VERSIONS = host_budgets.versions() == BUDGETS["versions"]
QUICK = ["patched LLaVA", "patched InternVL", "patched Qwen2.5-VL", "patched Gemma 3"]
pytestmark = pytest.mark.skipif(stub_gpu.why_none() is not None, reason=str(stub_gpu.why_none()))


def test_every_patched_connector_has_a_budget():
    assert BUDGETS["connectors"].keys() == host_budgets.PATCHED.keys()


@pytest.mark.parametrize("name", slow_except(QUICK, host_budgets.PATCHED))
def test_host_work_is_within_the_budget(name, monkeypatch):
    with stub_gpu.active("c"):
        stub_gpu.serve_cpu_tensors(monkeypatch)
        found = host_budgets.work_of_connector(name)
    host_budgets.assert_within(found, BUDGETS["connectors"][name], SAME_VERSIONS)
