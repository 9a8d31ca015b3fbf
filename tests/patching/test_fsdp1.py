"""FSDP1 of a bf16 model with each norm as a separate fp32 unit: equal to unpatched."""

import copy
import warnings

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import vlm_fast
from tests.support.distributed_helpers import on_ranks
from tests.support.mixed_dtypes import BF16, FP32, cast, norms
from tests.support.tiny_models import build
from tests.support.ways_to_run import labels


def fsdp1_model_matches_unpatched(rank, world, name, original, in_fp32):
    model, given = build(name)
    model.to(BF16)
    for norm in norms(model) if in_fp32 else []:
        norm.to(FP32)
    fast = copy.deepcopy(model)
    vlm_fast.patch(fast)
    given = cast(given | labels(model, given), BF16)
    found = []
    for one in (model, fast):
        policy = ModuleWrapPolicy({type(norm) for norm in norms(one)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FSDP1 warns that it is deprecated
            sharded = FullyShardedDataParallel(
                one, auto_wrap_policy=policy, device_id=torch.device("cpu"),
                use_orig_params=original,
            )  # fmt: skip
            output = sharded(**given)
            output.loss.backward()
        gradients = [p.grad for p in sharded.parameters() if p.grad is not None]
        found.append([output.logits, output.loss, *gradients])
    assert len(found[0]) == len(found[1]) > 10
    for theirs, ours in zip(*found, strict=True):
        assert ours.dtype is theirs.dtype
        scale = theirs.float().abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.04 * scale)


@pytest.mark.multiprocess
def test_on_two_ranks(tmp_path):
    checks = [
        (fsdp1_model_matches_unpatched, name, original, in_fp32)
        for name in ("gemma3", "aya_vision", "qwen3_5")
        for original, in_fp32 in ((True, True), (False, True), (True, False))
    ]
    on_ranks(tmp_path, checks)
