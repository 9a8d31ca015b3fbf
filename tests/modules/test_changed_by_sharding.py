"""Connectors that FSDP2 shards after their first calls compute with the gathered parameters."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import vlm_fast
from tests.support.connectors_of_every_kind import CONNECTORS, called, fallbacks, results
from tests.support.distributed_helpers import on_ranks
from tests.support.sharding_strategies import full_tensor_of


def sharded_after_a_call(rank, world, name):
    fast, plain, given = called(name)
    before = results(fast, given)
    fully_shard(fast)
    fast.set_requires_gradient_sync(True)
    for factor in (1.0, 1.5):  # parameters are gathered anew, with other values
        with torch.no_grad():
            for module in (fast, plain):
                for parameter in module.parameters():
                    parameter.mul_(factor)
        expected = results(plain, given)
        with vlm_fast.strict():
            y = fast(**given)
            y = y[0] if isinstance(y, tuple) else getattr(y, "last_hidden_state", y)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        assert torch.allclose(y, expected["output"], rtol=1e-4, atol=1e-5) and not fallbacks()
        for path, parameter in fast.named_parameters():
            if expected[path] is not None:
                found = full_tensor_of(parameter.grad)
                torch.testing.assert_close(found, expected[path], rtol=1e-4, atol=1e-4, msg=path)
            parameter.grad = None
    assert before.keys() == expected.keys()


@pytest.mark.multiprocess
@pytest.mark.slow
def test_sharded_after_a_call(tmp_path):
    on_ranks(tmp_path, [(sharded_after_a_call, name) for name in CONNECTORS], worlds=(1,))
