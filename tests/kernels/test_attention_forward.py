"""Attention's forward for every tiling, number of splits and kind of scale."""

import pytest
import torch

from tests.support.op_accuracy import assert_accurate
from vlm_fast.kernels import _cross_attention_forward
from vlm_fast.kernels._attention_shares import FULL_GPU, MAX_SPLITS, forward_splits
from vlm_fast.kernels._attention_tilings import forward_tiling
from vlm_fast.kernels._launcher import assume_capability, recording
from vlm_fast.kernels.cross_attention import attention_forward
from vlm_fast.ops.declaration import OPS

pytestmark = pytest.mark.devices("interpreter", "cuda")

ATTENTION = OPS["cross_attention"]
half_dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"]
)
SHAPES = [
    dict(batch=2, heads=2, shape=(32, 257), d=64),
    dict(batch=1, heads=2, shape=(64, 577), d=128),
    dict(batch=1, heads=4, kv_heads=2, shape=(35, 130), keys2=33, d=96, hidden=True),
    dict(batch=2, heads=2, shape=(7, 65), d=80, hidden=True, blind=1),
    dict(batch=1, heads=2, shape=(33, 70), keys2=9, d=17),
    dict(batch=1, heads=2, shape=(130, 64), d=72),
]


def exact(q, k, v, scale):
    p = torch.softmax(scale * q.double() @ k.double().mT, -1)
    return p @ v.double()


@half_dtypes
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
def test_parity_at_every_tiling(device, shape, capability, dtype):
    with assume_capability(capability):
        args, options = ATTENTION.sample(shape, dtype, device)
        assert_accurate(ATTENTION, args, options, layout="padded rows")


@half_dtypes
@pytest.mark.parametrize("splits", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("shape", SHAPES[:4:2], ids=["one source", "two sources"])
def test_parity_with_splits(device, monkeypatch, shape, splits, dtype):
    monkeypatch.setattr(_cross_attention_forward, "forward_splits", lambda *sizes: splits)
    assert_accurate(ATTENTION, *ATTENTION.sample(shape, dtype, device))


@half_dtypes
@pytest.mark.parametrize("scale", [0.0, -0.2, 0.2])
def test_scales_of_either_sign(device, scale, dtype):
    """Only with a positive scale is the largest product of a row its largest score."""
    (q, k, v, *_), _ = ATTENTION.sample(dict(batch=1, heads=2, shape=(5, 70), d=24), dtype, device)
    with recording() as launches:
        o = ATTENTION.fast(q, k, v, scale=scale)
    assert launches[0].arguments["KEYS"] == (1 if scale > 0 else 0)
    torch.testing.assert_close(o.double(), exact(q, k, v, scale), rtol=0.02, atol=0.01)


@half_dtypes
def test_the_layout_of_a_tile_does_not_change_what_is_kept(device, dtype):
    """A bias of zeros brings the other layout, ``[keys, rows]``."""
    (q, k, v, *_), _ = ATTENTION.sample(dict(batch=1, heads=2, shape=(9, 150), d=64), dtype, device)
    zeros = torch.zeros(1, 2, 9, 150, dtype=dtype, device=device)
    with recording() as launches:
        found = [
            attention_forward(
                q, k, v, None, None, bias, None, None, scale=0.125, dropout=0.0, keep=True
            )
            for bias in (None, zeros)
        ]
    assert [launch.arguments["KEYS"] for launch in launches] == [1, 0]
    (o, lse, low), (other, other_lse, other_low) = found
    torch.testing.assert_close(lse, other_lse, rtol=1e-3, atol=1e-3)
    ours, theirs = o.float() + low.float(), other.float() + other_low.float()
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-3)


def test_fp32_and_what_takes_registers_keep_small_tiles():
    for capability in (80, 90, 100):
        for d in (64, 128):
            fp32 = forward_tiling(capability, torch.float32, 64, d, True)
            dropout = forward_tiling(capability, torch.bfloat16, 64, d, False)
            bias = forward_tiling(capability, torch.bfloat16, 64, d, False, True)
            assert fp32.keys_axis == dropout.keys_axis == bias.keys_axis == 0
            assert fp32.block_m == 16 and dropout.block_m == 32
            assert bias.block_m == (32 if capability == 90 or d == 64 else 16)


def test_splits_fill_the_gpu_only_where_that_saves_time():
    assert forward_splits(12, 257, 3) == 1  # one launch
    assert forward_splits(192, 677, 3) == 1
    assert forward_splits(192, 1025, 3) == 1
    assert forward_splits(80, 4964, 2) == 3
    assert forward_splits(1000, 100_000, 2) == 1
    for programs in (1, 7, 100, 131, 132, 133, 264, 500):
        for keys in (1, 64, 65, 300, 5000):
            splits = forward_splits(programs, keys, 2)
            assert 1 <= splits <= min(MAX_SPLITS, -(-keys // 64))
            assert splits == 1 or programs * splits <= 2 * FULL_GPU
