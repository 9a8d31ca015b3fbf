"""A text-only rank with connectors of several parts.

Qwen3-VL has several mergers, and LLaVA-OneVision a newline parameter beside its projector.
"""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import vlm_fast
from tests.support.distributed_helpers import on_ranks
from tests.support.sharding_strategies import assert_same_parameters
from tests.support.zero3_models import BOTH, batch_of, plain_and_patched


def pieces(name, model):
    """Connector parts that a text-only batch skips, in the order in which other ranks run them."""
    if name == "qwen3_vl":
        visual = model.model.visual
        return [*visual.deepstack_merger_list, visual.merger]
    return [model.model.multi_modal_projector, model.model.image_newline]


def freeze_tower(name, model):
    tower = model.model.visual if name == "qwen3_vl" else model.model.vision_tower
    tower.requires_grad_(False)
    for piece in pieces(name, model):
        piece.requires_grad_(True)


def text_only_rank_trains(rank, world, name, sharded, kinds):
    plain, fast = plain_and_patched(name)
    for model in (plain, fast):
        freeze_tower(name, model)
    batches = [batch_of(name, kinds), batch_of(name, ())]
    zero = torch.zeros(())
    if sharded:
        for _, connector in vlm_fast.connectors(fast):
            fully_shard(connector)
        fully_shard(fast)
        model = fast
    else:
        model = nn.parallel.DistributedDataParallel(fast)
    if sharded and rank == 1:
        fast.get_input_embeddings().register_forward_hook(
            lambda module, args, embeds: embeds + vlm_fast.touch_parameters(*pieces(name, fast))
        )
    for _ in range(2):  # DistributedDataParallel raises at the next forward
        fast.zero_grad()
        if rank == 1 and not sharded:
            zero = vlm_fast.touch_parameters(*pieces(name, fast))
        (model(**batches[rank]).loss + zero).backward()
    (sum(plain(**batch).loss for batch in batches) / world).backward()
    assert_same_parameters(fast, plain, lambda p: p.grad)


def touch_parameters_accepts_a_parameter(rank, world):
    projector, newline = nn.Linear(2, 3), nn.Parameter(torch.full((3,), torch.inf))
    vlm_fast.touch_parameters(projector, newline).backward()
    assert not newline.grad.any() and not projector.weight.grad.any()
    assert vlm_fast.touch_parameters(copy.deepcopy(newline)).item() == 0


@pytest.mark.multiprocess
def test_on_two_ranks(tmp_path):
    checks = [
        (text_only_rank_trains, name, sharded, kinds)
        for name in ("qwen3_vl", "llava_onevision")
        for sharded in (False, True)
        for kinds in (BOTH[:1], BOTH[1:])
        # A video-only batch does not use the image newline, patched or not.
        if (name, kinds) != ("llava_onevision", BOTH[1:]) or sharded
    ]
    on_ranks(tmp_path, [(touch_parameters_accepts_a_parameter,), *checks])
