"""torch.export of modules: saved, loaded, and correct for every batch size."""

import io

import pytest
import torch
from torch.export import Dim

from tests.support.selection import slow_except
from tests.support.small_connectors import CONNECTORS


def first(output):
    return getattr(output, "last_hidden_state", output)


@pytest.mark.parametrize("kind", slow_except(list(CONNECTORS)[:3], CONNECTORS))
def test_export_save_and_load_round_trip(kind):
    make, given = CONNECTORS[kind]
    module = make()
    batch = Dim("batch", min=1, max=64)
    shapes = tuple(None if tensor is None else {0: batch} for tensor in given(2))
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, given(2), dynamic_shapes=shapes), file)
    file.seek(0)
    program = torch.export.load(file)
    assert not any("vlm_fast" in str(node.target) for node in program.graph.nodes)
    assert program.state_dict.keys() >= module.state_dict().keys()
    for count in (1, 2, 5):
        inputs = given(count)
        ours, expected = first(program.module()(*inputs)), first(module(*inputs))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
