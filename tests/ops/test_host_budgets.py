"""What the host does in a call of an op stays within its budget (tests/tools/host_budgets.py)."""

import json

import pytest

from tests.support import stub_gpu
from tests.support.selection import slow_except
from tests.tools import host_budgets
from vlm_fast.ops.declaration import OPS

BUDGETS = json.loads(host_budgets.FILE.read_text())
SAME_VERSIONS = host_budgets.versions() == BUDGETS["versions"]
pytestmark = pytest.mark.skipif(stub_gpu.why_none() is not None, reason=str(stub_gpu.why_none()))


def test_every_op_has_a_budget():
    assert BUDGETS["ops"].keys() == OPS.keys()


@pytest.mark.parametrize("name", slow_except(["add_layer_norm", "merge_image_tokens", "mlp"], OPS))
def test_host_work_is_within_the_budget(name, monkeypatch):
    with stub_gpu.active("c"):
        stub_gpu.serve_cpu_tensors(monkeypatch)
        found = host_budgets.work_of(OPS[name])
    host_budgets.assert_within(found, BUDGETS["ops"][name], SAME_VERSIONS)
