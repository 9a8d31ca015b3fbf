"""Patched whole models on gloo ranks match one process: DDP, FSDP2 with units of several sizes,
and tensor parallelism."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import vlm_fast
from tests.support import tiny_llava
from tests.support.distributed_helpers import on_ranks
from tests.support.sharding_strategies import (
    STRATEGIES,
    assert_same_parameters,
    batch_row,
    full_tensor_of,
    with_lora,
)
from tests.support.small_connectors import SMALL
from tests.support.whole_models import FAMILIES, distance, pair
from vlm_fast.modules import QFormer

STEPS = 2  # gradients of the second step depend on the weights after the first


def trained(model, loss_of, optimizer):
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        if step + 1 < STEPS:
            optimizer.step()
    return loss


@functools.cache
def in_one_process(family, world, lora):
    """The unpatched model before its last step, and the losses of the batch rows."""
    plain, _, given = pair(family)
    single = with_lora(plain, family) if lora else plain
    losses = []

    def loss_of(model, step):
        losses[:] = [model(**batch_row(given, row)).loss for row in range(world)]
        return sum(losses) / world

    trained(single, loss_of, torch.optim.SGD(single.parameters(), lr=0.05))
    return single, losses


def whole_model_matches_one_process(rank, world, family, spread, lora):
    """Compare losses, gradients and weights after SGD steps with one batch row per rank.

    ``lora``: with adapters in the connector and in the language model.
    """
    single, losses = in_one_process(family, world, lora)
    spread, fuses = STRATEGIES[spread]
    _, fast, given = pair(family)
    model = with_lora(fast, family) if lora else fast
    spreaded = spread(model, family)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    vlm_fast.stats(reset=True)
    loss = trained(spreaded, lambda m, step: m(**batch_row(given, rank)).loss, optimizer)
    torch.testing.assert_close(loss, losses[rank], rtol=1e-4, atol=1e-5)
    assert_same_parameters(model, single, lambda p: p.grad)
    assert_same_parameters(model, single, lambda p: p.detach())
    fallbacks = [r for counts in vlm_fast.stats().values() for r in counts["fallback"]]
    assert (not fallbacks) == (fuses and not lora), fallbacks
    if lora:
        assert all("peft" in reason or "FSDP" in reason for reason in fallbacks), fallbacks


# ---- mixed precision, tensor parallelism, the order of patching ----


def mixed_precision_is_as_accurate_as_unpatched(rank, world, family):
    plain, fast, given = pair(family)
    exact = plain(**batch_row(given, rank))
    exact.loss.backward()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    for gradient in wanted.values():
        dist.all_reduce(gradient)
        gradient /= world
    gradients, apart = [], []
    for model in (fast, plain):
        plain.zero_grad()
        units = [model.get_submodule(name) for name in FAMILIES[family].connectors]
        for unit in [*units, model]:
            fully_shard(unit, mp_policy=policy)
        vlm_fast.stats(reset=True)
        output = model(**batch_row(given, rank))
        assert not any(counts["fallback"] for counts in vlm_fast.stats().values())
        assert output.logits.dtype == torch.bfloat16
        output.loss.backward()
        found = {
            n: full_tensor_of(p.grad) for n, p in model.named_parameters() if p.grad is not None
        }
        assert found.keys() == wanted.keys()
        assert {g.dtype for g in found.values()} == {torch.float32}
        gradients.append(found)
        apart.append((output.logits.float() - exact.logits).norm())
    ours, native = gradients
    assert 0 < apart[0] <= 1.25 * apart[1]
    assert all(g.isfinite().all() for g in ours.values())
    # Only gradients that are finite unpatched: IDEFICS' own mask overflows in bf16.
    known = [name for name, g in native.items() if g.isfinite().all()]
    errors = [distance({n: found[n] for n in known}, wanted) for found in (ours, native)]
    assert 0 < errors[0] <= 1.25 * errors[1], errors


PARALLEL = {
    "llava": {"linear_1": ColwiseParallel, "linear_2": RowwiseParallel},
    "blip2": {
        "encoder.layer.*.intermediate_query.dense": ColwiseParallel,
        "encoder.layer.*.output_query.dense": RowwiseParallel,
    },
    "idefics": {"blocks.*.1.fc": ColwiseParallel, "blocks.*.1.c_proj": RowwiseParallel},
    "mllama": {
        "mlp.gate_proj": ColwiseParallel, "mlp.up_proj": ColwiseParallel,
        "mlp.down_proj": RowwiseParallel,
    },
}  # fmt: skip


def tensor_parallelism_falls_back(rank, world, family):
    plain, fast, given = pair(family)
    mesh = init_device_mesh("cpu", (world,))
    name = FAMILIES[family].connectors[0]
    connector = fast.get_submodule(name)
    parallelize_module(connector, mesh, {n: how() for n, how in PARALLEL[family].items()})
    why = vlm_fast.explain(fast)[name]
    assert why is not None and ("hooks" in why or "DTensor" in why), why
    ours, theirs = fast(**given), plain(**given)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    for output in (ours, theirs):
        output.loss.backward()
    assert_same_parameters(fast, plain, lambda p: p.grad)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):  # the shards are not read either
        for module in connector.modules():
            getattr(module, hooks).clear()
    assert "DTensor" in vlm_fast.explain(fast)[name]


def patch_after_sharding_raises(rank, world):
    projector = tiny_llava.llava().model.multi_modal_projector
    sharded = fully_shard(projector)
    kind = type(sharded)
    with pytest.raises(ValueError, match=r"already sharded|DTensor"):
        vlm_fast.patch(sharded)
    assert type(sharded) is kind


def dtensor_parameters_raise(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    args = [torch.randn(3, 4), torch.randn(6, 4), None, torch.randn(2, 6), None]
    spread = [None if a is None else distribute_tensor(a, mesh, [Replicate()]) for a in args]
    with pytest.raises((RuntimeError, NotImplementedError)):
        vlm_fast.ops.mlp(*spread)
    with pytest.raises((RuntimeError, NotImplementedError, TypeError, ValueError)):
        vlm_fast.ops.mlp(args[0], spread[1], None, spread[3], None)


def revert_after_sharding_raises(rank, world):
    model = tiny_llava.llava()
    report = vlm_fast.patch(model)
    projector = model.model.multi_modal_projector
    fully_shard(projector)
    kinds = [type(module) for module in model.modules()]
    for undo in (report.revert, lambda: vlm_fast.unpatch(model)):
        with pytest.raises(ValueError, match="stays patched: its class has become FSDP"):
            undo()
    assert kinds == [type(module) for module in model.modules()]  # all or no layers
    projector.unshard()


def qformer_sharded_by_layer_matches_one_process(rank, world, unit):
    """Units are layers, layers and encoder, or the whole Q-Former."""
    torch.manual_seed(0)
    whole_one = QFormer(**SMALL)
    sharded = copy.deepcopy(whole_one)
    units = {
        "layers": [*sharded.encoder.layer],
        "encoder": [*sharded.encoder.layer, sharded.encoder],
        "root": [],
    }[unit]
    for part in [*units, sharded]:
        fully_shard(part)
    query, image = torch.randn(1, 5, 48), torch.randn(world, 7, 40, requires_grad=True)
    for module, rows in ((whole_one, slice(None)), (sharded, slice(rank, rank + 1))):
        module.eval()
        row = image[rows]
        out = module(query.expand(len(row), -1, -1), encoder_hidden_states=row).last_hidden_state
        out.square().sum().backward()
        if module is whole_one:
            expected = out[rank : rank + 1]
            for p in module.parameters():
                p.grad = None if p.grad is None else p.grad / world
            of_image, image.grad = image.grad, None
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(image.grad[rank], of_image[rank], rtol=1e-4, atol=1e-5)
    assert_same_parameters(sharded, whole_one, lambda p: p.grad)
    if unit != "root":
        with pytest.raises(ValueError, match="image_key_values: encoder is sharded"):
            sharded.image_key_values(image)


CHECKS = {
    "whole models": [
        (whole_model_matches_one_process, family, spread, spread == "FSDP2, layers")
        for family in FAMILIES
        for spread in STRATEGIES
    ],
    "mixed precision": [
        (mixed_precision_is_as_accurate_as_unpatched, family) for family in FAMILIES
    ],
    "tensor parallel": [(tensor_parallelism_falls_back, family) for family in FAMILIES],
    "refusals": [
        (patch_after_sharding_raises,),
        (dtensor_parameters_raise,),
        (revert_after_sharding_raises,),
    ],
    "Q-Former": [
        (qformer_sharded_by_layer_matches_one_process, unit)
        for unit in ("layers", "encoder", "root")
    ],
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("checks", CHECKS)
def test_on_two_ranks(tmp_path, checks):
    on_ranks(tmp_path, CHECKS[checks])
