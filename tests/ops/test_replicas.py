"""Ranks choose alike, and replicas stay equal bit for bit, however late one of them is."""

import os
import tempfile
import time
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.kernels.test_configs import OnGpu
from tests.support.distributed_helpers import on_ranks
from tests.support.small_connectors import CONNECTORS, Headed
from tests.support.user_tables import CHOICE, GPU, NAME
from vlm_fast.devtools import tuning
from vlm_fast.kernels import _configs
from vlm_fast.kernels._launcher import KERNELS


def ranks_choose_alike(rank, world):
    """Configs come from tables that all ranks have, neither from times nor from one rank's own."""
    ticks = iter(range(10**9))
    properties = SimpleNamespace(major=9, minor=0, name=GPU)
    cuda = dict(get_device_properties=lambda _: properties, get_device_capability=lambda *_: (9, 0))
    with ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(os.environ, VLM_FAST_CACHE_DIR=cache))
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda, get_device_name=lambda *_: GPU))
        slower = lambda: next(ticks) * (1 + 9.0 * rank)  # noqa: E731
        stack.enter_context(mock.patch.object(time, "perf_counter", slower))
        if rank == world - 1:
            tuning.write(NAME, GPU, CHOICE)
        stack.callback(_configs.forget)
        _configs.forget()
        chosen = {
            name: [kernel.choose(OnGpu, size).options() for size in (1, 1000, 10**4, 10**6)]
            for name, kernel in KERNELS.items()
        }
    everywhere = [None] * world
    dist.all_gather_object(everywhere, chosen)
    assert len(chosen) > 10 and everywhere == [chosen] * world


def replicas_are_equal_bit_for_bit(rank, world, kind):
    """After fifty steps of AdamW; one rank is late at every one."""
    make, given = CONNECTORS[kind]
    torch.manual_seed(0)
    model = Headed(make())
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
    replicas = [(replicas_are_equal_bit_for_bit, kind) for kind in CONNECTORS]
    on_ranks(tmp_path, [(ranks_choose_alike,), *replicas])
