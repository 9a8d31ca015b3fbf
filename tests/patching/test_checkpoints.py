"""Checkpoints of patched models have the same keys and bytes as those of plain models."""

import copy

import accelerate
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file, save_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard

import vlm_fast
from tests.support import tiny_flamingos, tiny_models, tiny_qformers
from tests.support.distributed_helpers import on_ranks
from tests.support.small_connectors import SMALL
from vlm_fast.modules import GatedCrossAttentionBlock, PerceiverResampler, QFormer


def patched(model):
    vlm_fast.patch(model)
    return model


def seeded(build):
    torch.manual_seed(0)
    return build()


def captioner(family):
    return tiny_qformers.whole(f"{family}ForConditionalGeneration")[0]


# The plain module and a patched copy.
PAIRS = {
    "BLIP-2": (lambda: captioner("Blip2"), patched),
    "InstructBLIP": (lambda: captioner("InstructBlip"), patched),
    "IDEFICS": (tiny_flamingos.idefics, patched),
    "Llama 3.2": (tiny_flamingos.mllama, patched),
    "LLaVA": (lambda: tiny_models.build("llava")[0], patched),
    "Aria": (lambda: tiny_models.build("aria")[0], patched),
    "QFormer": (lambda: QFormer(**SMALL), lambda module: module),
    "QFormer.from_module": (lambda: tiny_qformers.blip2(**SMALL), QFormer.from_module),
    "block": (lambda: GatedCrossAttentionBlock(dim=24, dim_visual=12), lambda module: module),
    "resampler": (lambda: PerceiverResampler(dim=24, num_latents=4), lambda module: module),
}


@pytest.fixture(params=PAIRS)
def two(request):
    build, made = PAIRS[request.param]
    plain = seeded(build)
    return plain, made(copy.deepcopy(plain))


def assert_same_state(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def through_torch_save(model, path):
    torch.save(model.state_dict(), path / "weights.pt")
    return torch.load(path / "weights.pt", weights_only=True)


def through_save_file(model, path):
    save_file(model.state_dict(), path / "weights.safetensors")
    return load_file(path / "weights.safetensors")


def through_save_model(model, path):
    save_model(model, str(path / "weights.safetensors"))
    return load_file(path / "weights.safetensors")


def through_accelerate(model, path):
    accelerate.Accelerator(cpu=True).save_model(model, path)
    return load_file(path / "model.safetensors")


def through_distributed_checkpoint(model, path):
    dcp.save({"model": model.state_dict()}, checkpoint_id=path, no_dist=True)
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    dcp.load({"model": state}, checkpoint_id=path, no_dist=True)
    return state


WRITERS = [
    through_torch_save, through_save_file, through_save_model, through_accelerate,
    through_distributed_checkpoint,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITERS)
def test_writers_save_the_same_keys_and_bytes_as_unpatched(two, write, tmp_path):
    plain, fast = two
    for name in ("plain", "fast"):
        (tmp_path / name).mkdir()
    try:
        expected = write(plain, tmp_path / "plain")
    except RuntimeError as error:  # save_file refuses tied weights
        assert "share memory" in str(error)
        with pytest.raises(RuntimeError, match="share memory"):
            write(fast, tmp_path / "fast")
        return
    found = write(fast, tmp_path / "fast")
    assert_same_state(dict(sorted(found.items())), dict(sorted(expected.items())))
    for name in found.keys() & plain.state_dict().keys():
        assert torch.equal(found[name], plain.state_dict()[name])
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / name).rglob("*.safetensors"))
        for name in ("plain", "fast")
    ]
    assert sizes[0] == sizes[1]


def test_accelerate_resume_is_bitwise_equal(two, tmp_path):
    """Take two steps, save, take two more, and repeat these two from the checkpoint."""
    _, model = two
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)

    def steps():
        for i in range(2):
            for j, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, 0.1 * (i + 1) + 0.01 * (j % 7))
            optimizer.step()

    steps()
    accelerator.save_state(tmp_path / "state")
    steps()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(tmp_path / "state")
    steps()
    assert_same_state(dict(model.named_parameters()), expected)


def sharded_state_dict_matches_unpatched(rank, world, name):
    build, made = PAIRS[name]
    plain = seeded(build)
    fast = made(copy.deepcopy(plain))
    for _, connector in vlm_fast.connectors(fast):
        if connector is not fast:
            fully_shard(connector)
    fully_shard(fast)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = get_model_state_dict(fast, options=options)
    if rank == 0:
        assert_same_state(found, plain.state_dict())
    doubled = {name: tensor * 2 for name, tensor in plain.state_dict().items()}
    set_model_state_dict(fast, doubled, options=StateDictOptions(full_state_dict=True))
    for name, p in fast.named_parameters():
        assert torch.equal(p.full_tensor(), plain.state_dict()[name] * 2)


@pytest.mark.multiprocess
def test_fsdp2_state_dict_matches_unpatched(tmp_path):
    names = ("BLIP-2", "QFormer", "LLaVA")
    on_ranks(tmp_path, [(sharded_state_dict_matches_unpatched, name) for name in names])


def test_parameters_do_not_share_memory(two):
    _, fast = two
    parameters = list(fast.parameters())
    for convert in (lambda m: m, lambda m: m.double(), lambda m: m.float(), copy.deepcopy):
        parameters = list(convert(fast).parameters())
        places = {p.untyped_storage().data_ptr() for p in parameters}
        assert len(places) == len(parameters)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters)
