"""Attention's kernels, which have exclusive configs, as they are compiled ahead of time."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
from vlm_fast.devtools import ahead_of_time
from vlm_fast.kernels._launcher import KERNELS, assume_capability
from vlm_fast.ops.declaration import OPS

ATTENTION, MEDIA = OPS["cross_attention"], OPS["media_cross_attention"]
BLIP2 = ATTENTION.bench_shapes["BLIP-2, 64 images"]
IDEFICS2 = ATTENTION.bench_shapes["Idefics2 perceiver, 8 images"]


def exclusive_launches(shape, capability, dtype=torch.bfloat16, op=ATTENTION):
    with assume_capability(capability):
        found = ahead_of_time.launches_at(op, shape, dtype)
    return {launch.kernel.name: launch for launch in found if launch.kernel.exclusive}


def test_each_launch_is_compiled_with_its_own_exclusive_config():
    built = {
        arch: {
            (b.kernel.name, b.config)
            for b in ahead_of_time.builds([arch], ops=["cross_attention"], thorough=False)
            if b.kernel.exclusive and "q bf16" in b.signature
        }
        for arch in ("sm_80", "sm_90")
    }
    assert built["sm_80"] != built["sm_90"]
    for arch, capability in (("sm_80", 80), ("sm_90", 90)):
        chosen = {
            (launch.kernel.name, launch.config)
            for shape in ATTENTION.bench_shapes.values()
            for launch in exclusive_launches(shape, capability).values()
        }
        assert built[arch] == chosen


def test_every_exclusive_config_is_chosen_for_some_gpu():
    heavy = dict(batch=1, heads=1, shape=(32, 64), d=64, bias="full", dropout=0.25)
    many = dict(heavy, shape=(130, 64))
    more = [
        heavy,
        dict(heavy, d=96),
        dict(heavy, shape=(9, 64)),
        many,
        dict(batch=1, heads=1, shape=(130, 64), d=64),
    ]
    more.append(dict(batch=1, heads=1, shape=(130, 64), d=128))
    few = dict(batch=1, heads=1, queries=40, media=1, keys=9, tokens_per_media=9, d=128)
    shapes = [(ATTENTION, shape) for shape in (*ATTENTION.bench_shapes.values(), *more)]
    shapes += [(MEDIA, shape) for shape in (*MEDIA.bench_shapes.values(), few)]
    chosen = {
        (name, launch.config)
        for capability in (80, 90, 100)
        for op, shape in shapes
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for name, launch in exclusive_launches(shape, capability, dtype, op).items()
    }
    assert chosen == {
        (name, i) for name, k in KERNELS.items() if k.exclusive for i in range(len(k.configs))
    }


def test_tokens_that_are_far_apart_have_kernels_that_compile():
    many = dict(batch=1, heads=1, shape=(130, 64), d=64)
    found = exclusive_launches(many, 90).values()
    wide = [dataclasses.replace(x, arguments={**x.arguments, "WIDE": True}) for x in found]
    assert len(wide) == 3
    builds = [ahead_of_time.build_of(launch, "sm_90", launch.config) for launch in wide]
    assert all(r.tensor_core for r in ahead_of_time.count(builds))


def test_hopper_keeps_the_probabilities_of_the_forward_in_registers():
    """Products take 64 rows, none waits for the next, and warps meet only for keys and values."""
    launch = exclusive_launches(BLIP2, 90)["cross_attention_kernel"]
    build = ahead_of_time.build_of(launch, "sm_90", launch.config)
    (found,) = ahead_of_time.count([build])
    assert found.dots == 3 and found.async_loads and not found.spills
    code = build.compile().asm["ptx"]
    assert "mma.sync" not in code
    products = code.count("wgmma.mma_async")
    assert code.count("wgmma.commit_group") < products


def test_products_of_attention_backward():
    """Five for few rows, seven for many rows in two kernels; one more finds the mean of dp."""
    found = {
        shape["shape"]: {
            name: ahead_of_time.count([ahead_of_time.build_of(launch, "sm_90", launch.config)])[0]
            for name, launch in exclusive_launches(shape, 90).items()
            if name.endswith("gradient_kernel")
        }
        for shape in (BLIP2, IDEFICS2)
    }
    few, many = found[32, 257], found[64, 729]
    assert {name: r.dots for name, r in few.items()} == {"query_gradient_kernel": 5 + 1}
    parts = 2  # of a head of 96 features: 64 and 32
    assert {name: r.dots for name, r in many.items()} == {
        "query_gradient_kernel": (3 + 1) * parts, "key_value_gradient_kernel": 4 * parts,
    }  # fmt: skip
    for r in (*few.values(), *many.values()):
        assert r.async_loads and not r.spills and not r.stack_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_products_of_media_attention_backward(dtype):
    """Five if a row sees one tile of keys. On Hopper their steps do not wait for each other."""
    shape = MEDIA.bench_shapes["OpenFlamingo-9B, 8 x 2048, 1 image"]
    for arch, capability in (("sm_80", 80), ("sm_90", 90), ("sm_100", 100)):
        (launch,) = (
            launch
            for name, launch in exclusive_launches(shape, capability, dtype, MEDIA).items()
            if name.endswith("gradient_kernel")
        )
        build = ahead_of_time.build_of(launch, arch, launch.config)
        (found,) = ahead_of_time.count([build])
        assert launch.kernel.name == "media_gradient_kernel" and found.dots == 5
        assert not found.spills and not found.stack_bytes
        if arch == "sm_90":
            code = build.compile().asm["ptx"]
            assert "mma.sync" not in code and found.async_loads
            assert code.count("wgmma.commit_group") == code.count("wgmma.mma_async") // 4
