"""Distributed training with ranks that have no images: no deadlock, and gradients match one
process."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import vlm_fast
from tests.support import tiny_llava
from tests.support.distributed_helpers import on_ranks
from tests.support.sharding_strategies import (
    STRATEGIES,
    assert_same_parameters,
    batch_row,
    full_tensor_of,
    shard_by_layer,
    shard_by_leaf,
)
from tests.support.small_connectors import CONNECTORS, WithHead
from tests.support.whole_models import FAMILIES, pair, with_labels
from vlm_fast.modules import MLPProjector
from vlm_fast.training.recipes import RECIPES


def connector_matches_one_process(rank, world, kind, spread, counts):
    """Compare output and averaged gradients; ``counts``: the number of images on each rank."""
    make, given = CONNECTORS[kind]
    torch.manual_seed(0)
    single = WithHead(make())
    single(*given(2))  # LazyLinear infers the width
    model = copy.deepcopy(single)
    batches = [given(count) for count in counts]
    spreaded = STRATEGIES[spread][0](model, None)
    name = type(single.connector).__name__
    with warnings.catch_warnings(), vlm_fast.strict():
        warnings.filterwarnings("error", message=rf"FSDP2.* \(FSDP{name}\) returned a view")
        ours = spreaded(*batches[rank])
    ours.square().sum().backward()
    theirs = [single(*batch) for batch in batches]
    (sum(y.square().sum() for y in theirs) / world).backward()
    torch.testing.assert_close(ours, theirs[rank])
    assert all(p.grad is not None for p in model.connector.parameters() if p.requires_grad)
    ours, expected = (
        {n: full_tensor_of(p.grad) for n, p in m.named_parameters() if p.grad is not None}
        for m in (model, single)
    )
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


def text_only_rank_trains_with_other_ranks(rank, world, family, sharded):
    """One rank has no image: no rank blocks, and gradients match one process."""
    plain, fast, given = pair(family)
    for model in (plain, fast):
        model.get_submodule(TOWERS[family]).requires_grad_(False)
    batches = [batch_row(given, row) for row in range(world)]
    text = batches[-1]
    for name in FAMILIES[family].images:
        del text[name]
    text["input_ids"] = text["input_ids"].masked_fill(
        text["input_ids"] == tiny_llava.IMAGE_TOKEN, 9
    )
    batches[-1] = with_labels(text)
    unseen = [m for name, m in fast.named_modules() if name in skipped(family)]
    spreaded = (
        shard_by_layer(fast, family) if sharded else nn.parallel.DistributedDataParallel(fast)
    )
    zero = torch.zeros(())
    if rank == world - 1 and sharded:  # at the point where other ranks run the connector
        fast.get_input_embeddings().register_forward_hook(
            lambda module, args, embeds: embeds + vlm_fast.touch_parameters(*unseen)
        )
    elif rank == world - 1:
        zero = vlm_fast.touch_parameters(*unseen)
    for _ in range(2):  # DistributedDataParallel raises at the next forward
        fast.zero_grad()
        (spreaded(**batches[rank]).loss + zero).backward()
        zero = vlm_fast.touch_parameters(*unseen) if rank == world - 1 and not sharded else zero
    (sum(plain(**batch).loss for batch in batches) / world).backward()
    assert_same_parameters(fast, plain, lambda p: p.grad)


TOWERS = {"llava": "model.vision_tower", "mllama": "model.vision_model"}


def skipped(family):
    """Trainable modules that a text-only batch does not run."""
    layers = FAMILIES[family].connectors if family == "mllama" else ()
    return {"model.multi_modal_projector", *layers}


def touch_parameters_covers_trainable_parameters(rank, world):
    module = nn.Sequential(nn.Linear(3, 4), MLPProjector(4, 5))
    module[0].bias.requires_grad_(False)
    module[0].weight.data.fill_(torch.nan)
    zero = vlm_fast.touch_parameters(module[0], module[1])
    assert zero.item() == 0 and vlm_fast.touch_parameters().item() == 0
    zero.backward()
    assert module[0].bias.grad is None
    assert all(not p.grad.any() for p in module.parameters() if p.requires_grad)
    sharded = shard_by_leaf(
        copy.deepcopy(module), None
    )  # nested units: each gathers its own parameters
    sharded.zero_grad()
    vlm_fast.touch_parameters(sharded).backward()
    found = [full_tensor_of(p.grad) for p in sharded.parameters() if p.requires_grad]
    assert len(found) == 5 and not any(gradient.any() for gradient in found)
    assert "forward" not in vars(sharded)


def recipes_touch_parameters_behind_sharded_tower(rank, world):
    """Every layer is a unit, also in the frozen tower, and both ranks must gather all of them."""
    models = [tiny_llava.llava() for _ in range(2)]
    for one in models:
        vlm_fast.patch(one)
        RECIPES["llava-stage1"].prepare(one)
    model, single = (one.model for one in models)
    layers = [*model.vision_tower.encoder.layers, *model.language_model.layers]
    for unit in (model.multi_modal_projector, *layers, models[0]):
        fully_shard(unit)
    inputs = with_labels(tiny_llava.prompt())
    models[1](**inputs).loss.backward()
    if rank == 1:
        del inputs["pixel_values"]
        inputs["input_ids"] = inputs["input_ids"].clamp(min=8)
    models[0](**inputs).loss.backward()
    pairs = zip(
        model.multi_modal_projector.parameters(), single.multi_modal_projector.parameters(),
        strict=True,
    )  # fmt: skip
    for ours, single_parameter in pairs:
        torch.testing.assert_close(full_tensor_of(ours.grad), single_parameter.grad / world)


CHECKS = [
    (connector_matches_one_process, kind, spread, counts)
    for kind in CONNECTORS
    for spread in ("FSDP2, connectors", "DDP")
    for counts in ((3, 2), (3, 0))
] + [
    (touch_parameters_covers_trainable_parameters,),
    (recipes_touch_parameters_behind_sharded_tower,),
    (text_only_rank_trains_with_other_ranks, "llava", False),
    (text_only_rank_trains_with_other_ranks, "llava", True),
    (text_only_rank_trains_with_other_ranks, "mllama", False),
]


@pytest.mark.multiprocess
def test_on_two_ranks(tmp_path):
    on_ranks(tmp_path, CHECKS)
