"""Media attention in 16 bits, for every tiling, number of splits and hostile value."""

import pytest
import torch

from tests.support.op_accuracy import assert_accurate
from vlm_fast.kernels import _media_cross_attention_backward, _media_cross_attention_forward
from vlm_fast.kernels._launcher import assume_capability, recording
from vlm_fast.kernels._media_attention_tilings import forward_tiling, key_tiling, query_tiling
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import tolerance

pytestmark = pytest.mark.devices("interpreter", "cuda")

ATTENTION = OPS["media_cross_attention"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
half_dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"]
)


def shape(heads, queries, media, tokens, d, *, batch=1, **others):
    return dict(
        batch=batch, heads=heads, queries=queries, media=media, keys=media * tokens,
        tokens_per_media=tokens, d=d, **others,
    )  # fmt: skip


LISTED = dict(attend="listed", unattended="everything", normed=True)
SHAPES = [
    shape(2, 150, 3, 64, 64, before=20),  # OpenFlamingo's 64 latents
    shape(1, 40, 2, 257, 64, before=5, attend="all_previous", unattended="uniform"),
    shape(4, 40, 2, 70, 128, kv_heads=1, before=10, sets="all", **LISTED),
    shape(4, 3, 2, 577, 128, kv_heads=1, before=-1, sets="all", **LISTED),
    shape(1, 40, 3, 64, 128, before=7, attend="listed", unattended="uniform", sets="previous"),
    shape(1, 70, 3, 65, 80, before=9, attend="listed", sets="previous"),
    shape(2, 9, 1, 729, 17, batch=2, before=3),
    shape(1, 130, 2, 20, 33, before=60, attend="all_previous"),
    shape(1, 130, 2, 60, 72, before=8, attend="listed", sets="previous"),
]


def sample(shape, dtype, device):
    return ATTENTION.sample(shape, dtype, device)


@pytest.mark.parametrize(
    "dtype, capability",
    [
        (torch.bfloat16, 90),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (torch.bfloat16, 80), (torch.bfloat16, 100), (torch.float16, 90),
                (torch.float32, 90),
            )
        ],
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
def test_parity_at_every_tiling(device, shape, dtype, capability):
    with assume_capability(capability):
        assert_accurate(
            ATTENTION, *sample(shape, dtype, device), layout="padded rows", upstream="padded rows"
        )


def test_shapes_have_every_tiling():
    rows_of = lambda s: s["heads"] // s.get("kv_heads", s["heads"]) * s["queries"]  # noqa: E731
    every_rows, every_d = (16, 64, 128), (64, 128)
    for gpu in (80, 90, 100):
        found = {forward_tiling(gpu, rows_of(s), s["d"], torch.bfloat16).config for s in SHAPES}
        assert found == {
            forward_tiling(gpu, r, d, torch.bfloat16).config for r in every_rows for d in every_d
        }
        for dtype in (torch.bfloat16, torch.float16):
            found = {query_tiling(gpu, rows_of(s), s["d"], dtype).config for s in SHAPES}
            assert found == {
                query_tiling(gpu, r, d, dtype).config for r in every_rows for d in every_d
            }
        found = {key_tiling(gpu, s["tokens_per_media"], s["d"]).config for s in SHAPES}
        assert found == {key_tiling(gpu, n, d).config for n in (64, 65) for d in every_d}


@pytest.mark.parametrize("splits", [2, 3, 16])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_parity_with_splits(device, monkeypatch, number, splits):
    """Of the keys of a row in the forward, and of the rows of a medium in backward."""
    monkeypatch.setattr(_media_cross_attention_forward, "key_splits", lambda *sizes: splits)
    monkeypatch.setattr(_media_cross_attention_backward, "row_splits", lambda *sizes: splits)
    args, options = sample(SHAPES[number], torch.bfloat16, device)
    with recording() as launches:
        assert_accurate(ATTENTION, args, options)
    assert {launch.arguments.get("splits") for launch in launches} == {None, splits}


@half_dtypes
@pytest.mark.parametrize("number", [0, 2, 4])
def test_gradients_of_alike_values(device, number, dtype):
    """dp is then nearly its mean, in which every rounding of o would be seen."""
    (q, k, v, *rest), options = sample(SHAPES[number], dtype, device)
    v = v[:, :, :1] + 0.01 * v
    assert q.numel() >= 4096
    assert_accurate(ATTENTION, (q, k, v, *rest), options)


@half_dtypes
@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_key_with_all_the_weight_has_no_gradient(device, number, dtype):
    (q, k, v, index, _), options = sample(SHAPES[number], dtype, device)
    q, k = q.abs() + 1, k.abs()
    k[:, :, 10] = 60.0
    assert_accurate(ATTENTION, (q, k, v, index, None), options)


@half_dtypes
@pytest.mark.parametrize("number", [0, 1, 4, 5])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_queries_that_are_not_finite(device, number, value, dtype):
    """They make no other token's result and no gradient of a medium they do not see NaN."""
    (q, *rest), options = sample(SHAPES[number], dtype, device)
    q[:, 0, 2, 5] = q[:, 0, -1, 6] = value
    assert_accurate(ATTENTION, (q, *rest), options, ignore_nonfinite=True)


@half_dtypes
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-35])
@pytest.mark.parametrize("number", [0, 3])
def test_scales_that_are_not_positive(device, number, scale, dtype):
    """The forward takes the largest unscaled score of a row, so its scale must be positive."""
    args, options = sample(SHAPES[number], dtype, device)
    assert_accurate(ATTENTION, args, {**options, "scale": scale})


@pytest.mark.parametrize("index", [[5, 0, 2, 0, 7], [0, 0, 0, 0, 0], [0b100, 0b1, 0, 0b101, 0b10]])
def test_sets_in_any_order(device, index):
    """Media between those that are seen are skipped, and so are tiles that see none."""
    args, options = sample(
        shape(1, 5, 3, 70, 16, before=0, attend="listed"), torch.bfloat16, device
    )
    q, k, v, *_ = args
    index = torch.tensor([index], device=device)
    for unattended in ("zero", "uniform", "everything"):
        assert_accurate(ATTENTION, (q, k, v, index, None), {**options, "unattended": unattended})


@pytest.mark.parametrize("index", [[3, 1, 0, 2, 1], [0, 0, 0, 0, 0]])
def test_media_in_any_order(device, index):
    args, options = sample(shape(1, 5, 3, 7, 16, before=0), torch.bfloat16, device)
    q, k, v, *_ = args
    index = torch.tensor([index], device=device)
    for attend in ("latest", "all_previous"):
        assert_accurate(ATTENTION, (q, k, v, index, None), {**options, "attend": attend})


@half_dtypes
def test_tokens_that_are_far_apart(device, dtype):
    """With 2**23 elements between tokens the offsets in a tile do not fit in int32."""
    (q, k, v, *rest), options = sample(shape(1, 4, 1, 5, 16, before=0), dtype, device)
    far = torch.empty(5 * 2**23, dtype=dtype, device=device).as_strided(
        k.shape, (0, 0, 2**23, 1)
    )  # fmt: skip
    far.copy_(k)
    found = tolerance.outputs_and_gradients(ATTENTION.fast, (q, k, v, *rest), options)
    q2, far, v2 = (t.detach().requires_grad_() for t in (q, far, v))
    with recording() as launches:
        o = ATTENTION.fast(q2, far, v2, *rest, **options)
        grads = torch.autograd.grad(o, (q2, far, v2), tolerance.random_upstream(o))
    assert all(launch.arguments["WIDE"] for launch in launches)
    for ours, close in zip(grads, found[1], strict=False):
        assert torch.equal(ours, close)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_what_the_forward_keeps(device, dtype):
    """16-bit rows of o and a number for each row; nothing in fp32 or without gradients."""
    args, options = sample(shape(2, 5, 2, 9, 24, batch=2, before=1), dtype, device)
    settings = {**ATTENTION.defaults, **options}
    needs = ATTENTION.NeedsGrad(*[i < 3 for i in range(5)])
    o, saved = ATTENTION._path.forward(needs, *args, **settings)
    kept = [t for t in saved if t is not None and all(t is not a for a in args)]
    if dtype is torch.float32:
        assert kept == []
    else:
        assert kept[0] is o and kept[1].shape == (2, 2, 5) and kept[1].dtype == torch.float32
        assert kept[2].dtype == dtype and kept[2].stride() == o.stride()
    none = ATTENTION.NeedsGrad(*[False] * 5)
    assert ATTENTION._path.forward(none, *args, **settings)[1] == ()
