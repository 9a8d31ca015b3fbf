"""Data-parallel replicas stay bitwise equal, also if one rank is late."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support.distributed_helpers import on_ranks
from tests.support.small_connectors import CONNECTORS, WithHead


def replicas_are_equal_bit_for_bit(rank, world, kind):
    """Check weights after fifty AdamW steps in which one rank is always late."""
    make, given = CONNECTORS[kind]
    torch.manual_seed(0)
    model = WithHead(make())
    model(*given(2))
    replica = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(replica.parameters(), lr=1e-3)
    torch.manual_seed(rank)
    for step in range(50):
        if step % world == rank:
            torch.randn(200, 200).matmul(torch.randn(200, 200))
        optimizer.zero_grad()
        replica(*given(2)).square().mean().backward()
        optimizer.step()
    for parameter in model.parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, parameter)


@pytest.mark.multiprocess
def test_on_two_ranks(tmp_path):
    on_ranks(tmp_path, [(replicas_are_equal_bit_for_bit, kind) for kind in CONNECTORS])
