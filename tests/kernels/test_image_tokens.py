"""Image tokens merged and gathered: launches, counts, sizes, strides, and bytes of the mask."""

import dataclasses
import subprocess
import sys

import pytest
import torch

import vlm_fast
from tests.support.cases import DTYPES, OPS, shape_id
from tests.support.guard_bands import GuardBands
from tests.support.op_accuracy import assert_accurate
from vlm_fast.kernels import image_tokens
from vlm_fast.kernels._image_token_kernels import (
    merge_image_tokens_kernel,
    split_image_tokens_kernel,
)
from vlm_fast.kernels._launcher import recording, runs_triton
from vlm_fast.kernels.anyres_pack import merge_packed_rows

MERGE, GATHER, PACK = (
    OPS[name] for name in ("merge_image_tokens", "gather_image_tokens", "anyres_merge")
)
everywhere = pytest.mark.devices("cpu", "interpreter", "cuda")
triton_only = pytest.mark.devices("interpreter", "cuda")


def names_of(launches):
    return [launch.kernel.name for launch in launches]


@triton_only
@pytest.mark.parametrize("needed", [(0,), (1,), (0, 1)], ids=["text", "features", "both"])
def test_merge_is_one_launch_a_direction(device, needed):
    (embeds, features, mask), _ = MERGE.sample(MERGE.usual_shape, device=device)
    inputs = [x.requires_grad_(i in needed) for i, x in enumerate((embeds, features))]
    with recording() as launches:
        merged = MERGE.fast(embeds, features, mask)
    assert names_of(launches) == ["merge_image_tokens_kernel"]
    with recording() as launches:
        torch.autograd.grad(merged.sum(), [inputs[i] for i in needed])
    assert names_of(launches) == ["split_image_tokens_kernel"]


@triton_only
@pytest.mark.parametrize("frozen", [None, 0, 2])
def test_merge_of_a_list_is_one_launch_for_each_tensor(device, frozen):
    shape = dict(batch=2, sequence=30, hidden=40, images=2, tokens=4, as_list=True)
    (embeds, features, mask), _ = MERGE.sample(shape, device=device)
    wanted = [x.requires_grad_() for i, x in enumerate(features) if i != frozen]
    with recording() as launches:
        merged = MERGE.fast(embeds, features, mask)
    assert names_of(launches) == ["merge_image_tokens_kernel"] * 4
    dy = torch.randn_like(merged)
    with recording() as launches:
        found = torch.autograd.grad(merged, wanted, dy)
    assert names_of(launches) == ["split_image_tokens_kernel"] * len(wanted)
    expected = [rows for i, rows in enumerate(dy[mask].split(4)) if i != frozen]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@triton_only
def test_gather_is_one_launch_a_direction(device):
    (hidden, mask), options = GATHER.sample(GATHER.usual_shape, device=device)
    with recording() as launches:
        gathered = GATHER.fast(hidden.requires_grad_(), mask, **options)
    assert names_of(launches) == ["split_image_tokens_kernel"]
    with recording() as launches:
        torch.autograd.grad(gathered.sum(), hidden)
    assert names_of(launches) == ["merge_image_tokens_kernel"]


@triton_only
def test_anyres_merge_is_one_launch(device):
    args, options = PACK.sample(PACK.usual_shape, device=device)
    with recording() as launches:
        PACK.fast(*args, **options)
    assert names_of(launches) == ["merge_image_tokens_kernel"]


SIZES = {
    "one position": dict(batch=1, sequence=1, hidden=100, images=1, tokens=1),
    "sequences of one": dict(batch=9, sequence=1, hidden=8, images=1, tokens=1),
    "all image": dict(batch=2, sequence=6, hidden=1152, images=2, tokens=3),
    "no image": dict(batch=2, sequence=3, hidden=1, images=0, tokens=0),
    "two column blocks": dict(batch=1, sequence=5, hidden=4100, images=1, tokens=2),
    "one column block": dict(batch=1, sequence=5, hidden=4096, images=1, tokens=2),
    "one column": dict(batch=3, sequence=5, hidden=1, images=1, tokens=2),
}


@everywhere
@pytest.mark.aten
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("size", SIZES)
def test_rows_are_copied_exactly(device, size, dtype):
    (embeds, features, mask), _ = MERGE.sample(SIZES[size], dtype, device)
    count = int(mask.sum())
    leaves = [embeds.requires_grad_(), features.requires_grad_()]
    merged = MERGE.fast(embeds, features, mask)
    assert torch.equal(merged.double(), MERGE.reference(embeds.double(), features.double(), mask))
    dy = torch.randn_like(merged)
    dembeds, dfeatures = torch.autograd.grad(merged, leaves, dy)
    image = mask.unsqueeze(-1)
    assert torch.equal(dembeds, dy.masked_fill(image, 0)) and dembeds.is_contiguous()
    assert torch.equal(dfeatures.flatten(0, -2), dy[mask]) and dfeatures.is_contiguous()
    gathered = GATHER.fast(embeds, mask, count=count)
    assert torch.equal(gathered, embeds[mask])
    rows = torch.randn_like(gathered)
    (dhidden,) = torch.autograd.grad(gathered, embeds, rows)
    assert torch.equal(dhidden, torch.zeros_like(dhidden).masked_scatter(image, rows))


@everywhere
@pytest.mark.aten
@pytest.mark.parametrize("features_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", MERGE.test_shapes, ids=shape_id)
def test_features_in_another_dtype(device, shape, features_dtype):
    """Features in fp32 merge into bf16 embeddings, and their gradient is fp32."""
    (embeds, features, mask), options = MERGE.sample(shape, torch.bfloat16, device)
    change = lambda t: t.to(features_dtype) * 1.001  # noqa: E731
    features = [change(f) for f in features] if isinstance(features, list) else change(features)
    assert_accurate(MERGE, (embeds, features, mask), options, layout="padded rows")


@everywhere
@pytest.mark.aten
def test_mask_and_embeds_of_any_strides(device):
    (embeds, features, mask), _ = MERGE.sample(MERGE.usual_shape, device=device)
    expected = MERGE.reference(embeds, features, mask)
    apart = embeds.new_zeros(3, 40, 20)[:, 1:38, 2:19]
    apart.copy_(embeds)
    for strided in (mask.T.contiguous().T, torch.stack([mask, ~mask], -1)[..., 0]):
        assert torch.equal(MERGE.fast(apart, features, strided), expected)
        assert torch.equal(GATHER.fast(apart, strided, count=15), embeds[mask])


@everywhere
@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_result_does_not_depend_on_the_number_of_programs(device, programs, monkeypatch):
    """Nor on how many entries of the mask a step of the count takes."""
    monkeypatch.setattr(image_tokens, "MAX_PROGRAMS", programs)
    monkeypatch.setattr(image_tokens, "MAX_PROGRAMS_WITHOUT_TEXT", programs)
    for kernel in (merge_image_tokens_kernel, split_image_tokens_kernel):
        blocks = {**kernel.configs[0].blocks, "BLOCK_MASK": 32}
        small = dataclasses.replace(kernel.configs[0], blocks=blocks)
        monkeypatch.setattr(kernel, "configs", (small,))
    shape = dict(batch=3, sequence=37, hidden=9, images=2, tokens=5, as_list=True)
    (embeds, features, mask), _ = MERGE.sample(shape, device=device)
    assert torch.equal(MERGE.fast(embeds, features, mask), MERGE.reference(embeds, features, mask))
    assert torch.equal(GATHER.fast(embeds, mask, count=30), embeds[mask])


@everywhere
@pytest.mark.aten
@pytest.mark.parametrize("beyond", [-15, -1, 1, 96])
def test_wrong_count_is_an_error(device, beyond):
    (embeds, _, mask), _ = MERGE.sample(MERGE.usual_shape, device=device)
    count = int(mask.sum()) + beyond
    rows = embeds.new_ones(count, embeds.shape[-1])
    words = f"has {count} rows, expected 15, the true entries of image_mask"
    with vlm_fast.strict():
        with pytest.raises(ValueError, match=f"image_features {words}"):
            MERGE.fast(embeds, rows, mask)
        with pytest.raises(ValueError, match=f"count {words}"):
            GATHER.fast(embeds, mask, count=count)


@pytest.mark.devices("cpu", "interpreter")
@pytest.mark.aten
@pytest.mark.parametrize("beyond", [-15, -1, 1, 5000])
def test_wrong_count_reads_and_writes_nothing_outside(device, beyond):
    (embeds, _, mask), _ = MERGE.sample(MERGE.usual_shape, device=device)
    count = int(mask.sum()) + beyond
    with GuardBands() as bands:
        embeds, mask = bands.lay_out(embeds, "dense"), bands.lay_out(mask, "dense")
        rows = bands.lay_out(embeds.new_ones(count, embeds.shape[-1]), "dense")
        merged, gathered = embeds.new_empty(*embeds.shape), rows.new_empty(*rows.shape)
        index = bands.lay_out(torch.arange(count, dtype=torch.int32, device=device), "dense")
        at = index.new_empty(count)
        for call in (
            lambda: merge_packed_rows(embeds, mask, rows, index, None, merged, at),
            lambda: image_tokens.merge_image_tokens(embeds, [rows], mask, merged),
            lambda: image_tokens.split_image_tokens(embeds, mask, None, [(0, gathered)], count),
        ):
            if runs_triton(embeds):
                with pytest.raises(Exception, match="image_mask has another count than rows"):
                    call()
            else:
                assert call() == 15
    bands.check()


@pytest.mark.devices("cuda")
@pytest.mark.parametrize("call", [
    "vlm_fast.ops.merge_image_tokens(x, x[0, :3], mask)",
    "vlm_fast.ops.gather_image_tokens(x, mask, count=3)",
])  # fmt: skip
def test_wrong_count_is_asserted_on_the_device(call):
    """In a process of its own, because no CUDA call succeeds after a device-side assertion."""
    script = (
        "import torch, vlm_fast\n"
        "x, mask = torch.ones(1, 8, 64).cuda(), torch.arange(8).cuda()[None] < 2\n"
        f"{call}\ntorch.cuda.synchronize()\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode != 0 and "device-side assert" in found.stderr
    assert "image_mask has another count than rows" in found.stderr


@pytest.mark.parametrize("op", [MERGE, GATHER], ids=lambda op: op.name)
def test_bytes_of_the_mask_are_few(op):
    """What all programs of a launch together read of the mask, mostly from the cache.

    At 8 x 2944 x 4096 in bf16 a merge reads 6.0 MB of its mask of 24 kB and moves 386 MB. A gather
    of a fifth of these rows reads 4.7 MB and moves 76 MB, its gradient 6.0 of 231 MB.
    """
    ahead_of_time = pytest.importorskip("vlm_fast.devtools.ahead_of_time")
    for shape in op.bench_shapes.values():
        args, options = op.sample(shape, torch.bfloat16)
        cost = op.cost_of(*args, **options)
        launches = ahead_of_time.launches_at(op, shape, torch.bfloat16)
        assert len(launches) == 3  # forward, forward again and backward
        for launch in launches:
            moved = cost.backward_bytes if launch is launches[2] else cost.forward_bytes
            read = mask_bytes(launch, args[-1].flatten())
            assert read < (0.02 if op is MERGE else 0.07) * moved


def mask_bytes(launch, mask):
    share = launch.arguments["rows_per_program"]
    total = 0
    for program in range(*launch.programs()):
        own = mask[program * share : (program + 1) * share]
        total += len(own)
        if not moves_images_only(launch) or own.any() or (program + 1) * share >= len(mask):
            total += program * share
    return total


def moves_images_only(launch):
    return launch.kernel is split_image_tokens_kernel and launch.arguments["text_ptr"] is None
