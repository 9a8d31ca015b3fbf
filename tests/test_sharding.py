"""Two real ranks on gloo: FSDP2 in every granularity, DDP, and a rank without images."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import vlm_fast
from vlm_fast.modules import MLPProjector

RANKS = 2
WIDTHS = (12, 20, 8)


def step(projector, x):
    """Output, and the gradients averaged over ranks as data parallelism does."""
    y = projector(x)
    y.square().sum().backward()
    return y.detach()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.projector = MLPProjector(*WIDTHS)
        self.head = nn.Linear(WIDTHS[2], 4)

    def forward(self, x):
        return self.head(self.projector(x))


def shard_whole(model):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.projector)
    return fully_shard(model)


def shard_root(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def shard_leaves(model):
    from torch.distributed.fsdp import fully_shard

    for linear in (model.projector.linear_1, model.projector.linear_2):
        fully_shard(linear)
    return fully_shard(model)


def replicate(model):
    return nn.parallel.DistributedDataParallel(model)


# How the model is spread, and whether the projector can still be fused.
LAYOUTS = {
    "FSDP2 whole": (shard_whole, None),
    "FSDP2 root": (shard_root, None),
    "FSDP2 leaves": (shard_leaves, "linear_1: torch.distributed.fsdp"),
    "DDP": (replicate, None),
}


def compare_with_one_process(rank, layout, images):
    spread, reason = LAYOUTS[layout]
    torch.manual_seed(0)
    model = Model()
    single = copy.deepcopy(model)
    batches = [torch.randn(count, 5, WIDTHS[0]) for count in images]
    spread_model = spread(model)
    vlm_fast.stats(reset=True)
    y = step(spread_model, batches[rank])
    fallbacks = vlm_fast.stats().get("MLPProjector", {"fallback": {}})["fallback"]
    if reason is None:
        assert vlm_fast.stats()["mlp"]["fast"] == 1 and not fallbacks, fallbacks
    else:
        assert len(fallbacks) == 1 and reason in next(iter(fallbacks)), fallbacks
    gradients = []
    for own, batch in enumerate(batches):
        single.zero_grad()
        out = step(single, batch)
        gradients.append([p.grad.clone() for p in single.parameters()])
        if own == rank:
            torch.testing.assert_close(y, out)
    for parameter, *per_rank in zip(model.parameters(), *gradients, strict=True):
        expected = torch.stack(per_rank).mean(0)
        torch.testing.assert_close(whole(parameter.grad), expected)


def train_a_rank_without_images(rank):
    """Every layer a unit, those of the frozen tower too, whose gathers both ranks must ask for."""
    from torch.distributed.fsdp import fully_shard

    from tests.tiny_llava import llava, prompt
    from vlm_fast.recipes import RECIPES

    model, single = llava(), llava()
    for one in (model, single):
        vlm_fast.patch(one)
        RECIPES["llava-stage1"].prepare(one)
    layers = [*model.model.vision_tower.encoder.layers, *model.model.language_model.layers]
    for unit in (model.model.multi_modal_projector, *layers, model):
        fully_shard(unit)
    inputs = prompt() | {"labels": prompt()["input_ids"]}
    single(**inputs).loss.backward()
    if rank == 1:
        del inputs["pixel_values"]
        inputs["input_ids"] = inputs["input_ids"].clamp(min=8)
    model(**inputs).loss.backward()
    projectors = (one.model.multi_modal_projector for one in (model, single))
    for ours, alone in zip(*(projector.parameters() for projector in projectors), strict=True):
        torch.testing.assert_close(whole(ours.grad), alone.grad / RANKS)


def refuse_after_sharding(rank):
    from torch.distributed.fsdp import fully_shard

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear_1, self.act, self.linear_2 = nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)

        def forward(self, x):
            return self.linear_2(self.act(self.linear_1(x)))

    sharded = fully_shard(Plain())
    kind = type(sharded)
    with pytest.raises(ValueError, match=r"already sharded|DTensor"):
        vlm_fast.patch(sharded)
    assert type(sharded) is kind

    patched = Plain()
    vlm_fast.patch(patched)
    fully_shard(patched)
    x = torch.randn(3, 4)
    with vlm_fast.strict():
        patched(x).sum().backward()
    assert all(p.grad is not None for p in patched.parameters())


def refuse_dtensors(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    args = [torch.randn(3, 4), torch.randn(6, 4), None, torch.randn(2, 6), None]
    spread = [None if a is None else distribute_tensor(a, mesh, [Replicate()]) for a in args]
    with pytest.raises((RuntimeError, NotImplementedError)):
        vlm_fast.ops.mlp(*spread)
    with pytest.raises((RuntimeError, NotImplementedError, TypeError, ValueError)):
        vlm_fast.ops.mlp(args[0], spread[1], None, spread[3], None)


def _rank(rank, file, checks):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    for function, *arguments in checks:
        function(rank, *arguments)
    dist.barrier()  # gloo aborts a process whose peer has gone in the middle of a collective
    dist.destroy_process_group()


def on_ranks(tmp_path, *checks):
    """All checks in one pair of processes: starting them costs more than the checks."""
    mp.spawn(_rank, (str(tmp_path / "rendezvous"), checks), nprocs=RANKS)


def test_spread_over_ranks(tmp_path):
    on_ranks(tmp_path, *((compare_with_one_process, layout, (3, 2)) for layout in LAYOUTS))


def test_a_rank_without_images(tmp_path):
    layouts = ("FSDP2 whole", "DDP")
    checks = [(compare_with_one_process, layout, (3, 0)) for layout in layouts]
    on_ranks(tmp_path, *checks, (train_a_rank_without_images,))


def test_patch_before_sharding_never_after_and_dtensors_never_reach_a_kernel(tmp_path):
    on_ranks(tmp_path, (refuse_after_sharding,), (refuse_dtensors,))
