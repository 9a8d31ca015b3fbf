"""Builds of attention that no bench shape needs, and that once spilled registers."""

import pytest

pytest.importorskip("triton")
import torch

from vlm_fast.devtools import ahead_of_time
from vlm_fast.kernels._launcher import assume_capability
from vlm_fast.ops.declaration import OPS

ATTENTION = OPS["cross_attention"]
FORWARD = "cross_attention_kernel"


@pytest.mark.parametrize(
    "arch, queries, d, keys2, dropout",
    [
        ("sm_80", 2, 64, 0, 0.0),
        ("sm_80", 2, 96, 64, 0.0),
        ("sm_80", 6, 128, 64, 0.25),
        ("sm_90", 6, 96, 64, 0.25),
        ("sm_100", 2, 96, 64, 0.25),
    ],
)
def test_forward_with_bias_and_grouped_heads_does_not_spill(
    tmp_path, monkeypatch, arch, queries, d, keys2, dropout
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shape = dict(
        batch=64, heads=8, kv_heads=2, shape=(queries, 256), d=d, keys2=keys2, bias="full",
        hidden=True, dropout=dropout,
    )  # fmt: skip
    with assume_capability(int(arch.removeprefix("sm_"))):
        launches = ahead_of_time.launches_at(ATTENTION, shape, torch.bfloat16)
    launch = [x for x in launches if x.kernel.name == FORWARD][-1]  # the one that keeps lse
    (found,) = ahead_of_time.count([ahead_of_time.build_of(launch, arch, launch.config)])
    assert found.stack_bytes == found.spills == 0
