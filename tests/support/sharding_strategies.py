"""Ways to shard a model over ranks, and comparison with one process."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import vlm_fast
from tests.support.whole_models import FAMILIES, LANGUAGE


def shard_by_connector(model, family):
    for _, connector in vlm_fast.connectors(model):
        fully_shard(connector)
    return fully_shard(model)


def shard_by_leaf(model, family):
    for _, connector in vlm_fast.connectors(model):
        for module in list(connector.modules()):
            if isinstance(module, nn.Linear):
                fully_shard(module)
    return fully_shard(model)


def shard_by_layer(model, family):
    """Units as in trainers: each language model layer, each connector, the rest."""
    for layer in model.get_submodule(peft_name(model, FAMILIES[family].layers)):
        fully_shard(layer)
    connectors = [m for _, m in vlm_fast.connectors(model)]
    for connector in connectors:
        if not is_sharded(connector):
            fully_shard(connector)
    return fully_shard(model)


def shard_by_root(model, family):
    return fully_shard(model)


def replicated(model, family):
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def with_lora(model, family):
    """Add LoRA to the connector and the language model."""
    import peft

    torch.manual_seed(5)
    targets = f"{FAMILIES[family].lora_targets}|{LANGUAGE}"
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def peft_name(model, name):
    return f"base_model.model.{name}" if hasattr(model, "peft_config") else name


def is_sharded(module):
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


# Whether connectors are fused then: all, or none of the linears.
STRATEGIES = {
    "FSDP2, connectors": (shard_by_connector, True),
    "FSDP2, leaves": (shard_by_leaf, False),
    "FSDP2, layers": (shard_by_layer, True),
    "FSDP2, root": (shard_by_root, True),
    "DDP": (replicated, True),
}


def full_tensor_of(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def batch_row(given, row):
    return {name: value[row : row + 1] for name, value in given.items()}


def assert_same_parameters(model, single, of):
    theirs = dict(single.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        ours, expected = of(parameter), of(theirs[name])
        assert (ours is None) == (expected is None), name
        if expected is not None:
            atol = 1e-5 * max(1.0, expected.abs().max().item())
            torch.testing.assert_close(
                full_tensor_of(ours),
                expected,
                rtol=1e-4,
                atol=atol,
                msg=lambda m, n=name: f"{n}: {m}",
            )
            compared += 1
    assert compared >= 8
