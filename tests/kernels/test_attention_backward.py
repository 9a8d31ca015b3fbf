"""Attention's backward in 16 bits, for every tiling, number of splits and hostile value."""

import pytest
import torch

from tests.support.op_accuracy import assert_accurate, evaluate, verdict_on
from vlm_fast.kernels import _cross_attention_backward
from vlm_fast.kernels._attention_tilings import tiling
from vlm_fast.kernels._launcher import assume_capability, recording
from vlm_fast.kernels.cross_attention import attention_forward
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import tolerance

pytestmark = pytest.mark.devices("interpreter", "cuda")

ATTENTION = OPS["cross_attention"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
half_dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"]
)
# Numbers of keys: ViTs of 224, 336 and 378 pixels, SigLIP at 384 and 448 pixels, two more.
SHAPES = [
    dict(batch=1, heads=2, shape=(32, 257), d=64),
    dict(batch=1, heads=1, shape=(32, 577), d=64, hidden=True),
    dict(batch=1, heads=1, shape=(64, 729), d=72),
    dict(batch=1, heads=1, shape=(17, 1152), d=80),
    dict(batch=1, heads=1, shape=(32, 1408), d=88),
    dict(batch=0, heads=2, shape=(32, 257), d=64),
    dict(batch=1, heads=4, kv_heads=1, shape=(3, 70), d=17, hidden=True),
    dict(batch=2, heads=2, shape=(9, 40), d=33, hidden=True, blind=1),
    dict(batch=1, heads=1, shape=(33, 150), d=96, bias="full", dropout=0.25),
    dict(batch=1, heads=1, shape=(5, 70), d=113, bias="keys", dropout=0.25, hidden=True),
    dict(batch=1, heads=4, kv_heads=2, shape=(40, 70), keys2=9, d=64),
    dict(batch=1, heads=6, kv_heads=2, shape=(45, 130), keys2=33, d=96, hidden=True),
    dict(batch=1, heads=1, shape=(130, 150), d=128, bias="full", hidden=True, dropout=0.25),
    dict(batch=1, heads=1, shape=(140, 130), d=40, bias="full", dropout=0.25),
    dict(batch=1, heads=1, shape=(150, 140), d=64),
]


def sample(shape, dtype, device):
    return ATTENTION.sample(shape, dtype, device)


@pytest.mark.parametrize(
    "dtype, capability",
    [
        (torch.bfloat16, 90),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((torch.bfloat16, 80), (torch.float16, 90), (torch.float32, 90))
        ],
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
def test_parity_at_every_tiling(device, shape, dtype, capability):
    with assume_capability(capability):
        assert_accurate(
            ATTENTION, *sample(shape, dtype, device), layout="padded rows", upstream="padded rows"
        )


def test_shapes_have_every_tiling():
    """Every config of both kernels, for GPUs before and from Hopper on."""
    rows_of = lambda s: s["heads"] // s.get("kv_heads", s["heads"]) * s["shape"][0]  # noqa: E731
    for capability in (80, 90):
        found = [
            tiling(capability, rows_of(s), s["d"], ("bias" in s) + ("dropout" in s)) for s in SHAPES
        ]
        every = [
            tiling(capability, rows, d, heavy)
            for rows in (16, 32, 64, 128, 256) for d in (64, 80, 96, 128) for heavy in (0, 1, 2)
        ]  # fmt: skip
        for of in (lambda t: t.config, lambda t: None if t.one_kernel else t.key_config):
            assert {of(t) for t in found} == {of(t) for t in every}


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("splits", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[10], SHAPES[12]], ids=["one", "two", "many"])
def test_parity_with_splits(device, monkeypatch, shape, splits, dtype):
    keys2 = shape.get("keys2", 0)
    split = lambda *sizes: (splits, max(1, splits // 2) if keys2 else 0)  # noqa: E731
    monkeypatch.setattr(_cross_attention_backward, "gradient_splits", split)
    assert_accurate(ATTENTION, *sample(shape, dtype, device))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[12]], ids=["one", "many"])
def test_splits_do_not_change_key_gradients(device, monkeypatch, shape):
    args, options = sample(shape, torch.bfloat16, device)
    found = []
    for splits in (1, 5):
        monkeypatch.setattr(
            _cross_attention_backward, "gradient_splits", lambda *sizes, n=splits: (n, 0)
        )
        found.append(tolerance.outputs_and_gradients(ATTENTION.fast, args, options)[1])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:3], found[1][1:3], strict=True))


@half_dtypes
@pytest.mark.parametrize("rows", [32, 64, 130])
def test_gradients_of_alike_values(device, rows, dtype):
    """dp is then nearly its mean, in which every rounding of o would be seen."""
    args, options = sample(dict(batch=1, heads=2, shape=(rows, 257), d=64), dtype, device)
    q, k, v, *rest = args
    v = v[:, :, :1] + 0.01 * v
    assert q.numel() >= 4096
    assert_accurate(ATTENTION, (q, k, v, *rest), options)


@half_dtypes
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("rows, d", [(32, 64), (64, 96), (130, 64)])
def test_a_key_with_all_the_weight_has_no_gradient(device, rows, d, dropout, dtype):
    args, _ = sample(dict(batch=1, heads=1, shape=(rows, 257), d=d), dtype, device)
    q, k, v, *rest = args
    q, k = q.abs() + 1, k.abs()
    k[:, :, 100] = 60.0
    assert_accurate(ATTENTION, (q, k, v, *rest), dict(dropout=dropout))


@half_dtypes
@pytest.mark.parametrize("rows", [32, 9, 45, 140])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf], ids=str)
def test_infinite_scores(device, rows, value, dtype):
    args, options = sample(dict(batch=1, heads=2, shape=(rows, 70), d=64), dtype, device)
    q, k, *rest = args
    q = q.abs() + 0.1
    q[:, 1] *= -1  # so the scores of the first head are Inf, those of the second -Inf
    k[:, :, 3, 5] = value
    assert_accurate(ATTENTION, (q, k, *rest), options, ignore_nonfinite=True)


@half_dtypes
def test_infinite_keys_do_not_reach_the_gradient_of_values(device, dtype):
    """Rows past the last are 0, and 0 * Inf must not make NaN of a gradient that is 0."""
    args, options = sample(dict(batch=1, heads=1, shape=(9, 40), d=64), dtype, device)
    q, k, v, *rest = args
    k[:, :, 3, 5] = -torch.inf
    v = v.clone().requires_grad_()
    ATTENTION.fast(q.abs() + 0.1, k, v, *rest, **options).sum().backward()
    assert v.grad.isfinite().all() and not v.grad[:, :, 3].any()


@half_dtypes
@pytest.mark.parametrize("rows", [9, 45, 96, 140])
def test_hidden_keys_do_not_reach_the_gradients_of_keys_and_values(device, rows, dtype):
    args, options = sample(dict(batch=2, heads=1, shape=(rows, 70), d=64), dtype, device)
    q, k, v, k2, v2, bias, _, seed = args
    seen = torch.arange(70, device=device) % 3 != 1
    mask = seen.expand(2, 70)
    found = []
    for value in (0.0, torch.nan):
        k = k.masked_fill(~seen[:, None], value)
        args = (q, k, v, k2, v2, bias, mask, seed)
        found.append(tolerance.outputs_and_gradients(ATTENTION.fast, args, options)[1])
    for finite, ours in zip(found[0][1:3], found[1][1:3], strict=True):
        assert torch.equal(ours, finite) and not ours[:, :, ~seen].any()


@half_dtypes
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("rows", [9, 45, 140])
def test_a_row_of_nan_beside_hidden_keys(device, rows, dropout, dtype):
    """Keys get NaN as from float64; with many rows hidden ones get 0. All other rows are right."""
    shape = dict(batch=1, heads=2, shape=(rows, 70), d=64, hidden=True, dropout=dropout)
    args, options = sample(shape, dtype, device)
    q, *rest = args
    q[:, 1, 2, 5] = torch.nan
    names, found, _ = evaluate(ATTENTION, (q, *rest), options, tolerance.random_upstream)
    hidden = args[6][:, None, :, None] == 0
    for name, (ours, native, exact) in zip(names, found, strict=True):
        if rows > 32 and name in ("gradient 1", "gradient 2"):
            assert ours.isfinite().all(-1).any() and not ours[exact.isfinite() & hidden].any()
            alike = torch.where(hidden & (ours == 0), 0.0, 1.0)
            ours, native, exact = (torch.where(alike == 0, 0, t) for t in (ours, native, exact))
        verdict = verdict_on(name, (ours, native, exact), ())
        assert verdict.ok, verdict


@half_dtypes
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("rows", [9, 45, 140])
def test_scores_far_below_those_of_absent_keys(device, rows, hidden, dtype):
    """The score of a key that is loaded as zeros is 0, which exp2 of -lse makes infinite."""
    shape = dict(batch=1, heads=1, shape=(rows, 70), d=64, hidden=hidden)
    args, options = sample(shape, dtype, device)
    q, k, *rest = args
    assert_accurate(ATTENTION, (q.abs() + 4, -k.abs() - 40, *rest), options)


@half_dtypes
@pytest.mark.parametrize("rows", [32, 140])
def test_strides_of_zero_and_wide_ones(device, rows, dtype):
    args, options = sample(dict(batch=2, heads=2, shape=(rows, 70), d=64), dtype, device)
    q, k, v, *rest = args
    q, v = q[:1, :1].expand(2, 2, -1, -1), v[:, :1].expand(-1, 2, -1, -1)
    assert_accurate(ATTENTION, (q, k, v, *rest), options, upstream="expanded")


@half_dtypes
@pytest.mark.parametrize("rows", [3, 140])
def test_tokens_that_are_far_apart(device, rows, dtype):
    """With 2**23 elements between tokens the offsets in a tile do not fit in int32."""
    args, options = sample(dict(batch=1, heads=1, shape=(rows, 5), d=16), dtype, device)
    q, k, v, *rest = args
    far = torch.empty(5 * 2**23, dtype=dtype, device=device).as_strided(
        k.shape, (0, 0, 2**23, 1)
    )  # fmt: skip
    far.copy_(k)
    with recording() as launches:
        found = tolerance.outputs_and_gradients(ATTENTION.fast, (q, k, v, *rest), options)
        q2, far, v2 = (t.detach().requires_grad_() for t in (q, far, v))
        o = ATTENTION.fast(q2, far, v2, *rest, **options)
        grads = torch.autograd.grad(o, (q2, far, v2), tolerance.random_upstream(o))
    assert {launch.arguments.get("WIDE") for launch in launches} == {False, True}
    for ours, close in zip(grads, found[1], strict=False):
        assert torch.equal(ours, close)


@half_dtypes
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("keys", [40, 700])
def test_the_forward_sums_probabilities_as_rounded(device, keys, dropout, dtype):
    """So the mean of equal values is their value, and nothing is left for the low part."""
    args, _ = sample(dict(batch=1, heads=1, shape=(3, keys), d=16), dtype, device)
    q, k, v, _, _, bias, key_mask, seed = args
    ones = torch.ones_like(v)
    o, lse, low = attention_forward(
        q, k, ones, None, None, bias, key_mask, seed, scale=0.25, dropout=0.0, keep=True
    )
    assert (o == 1).all() and low.abs().max() <= 2**-22
    exact = torch.logsumexp(0.25 * q.double() @ k.double().mT, -1) / torch.tensor(2.0).log()
    torch.testing.assert_close(lse.double(), exact, rtol=1e-3, atol=1e-3)


@every_dtype
def test_what_the_forward_keeps(device, dtype):
    """16-bit rows of o and a number for each row; nothing in fp32 or without gradients."""
    args, options = sample(dict(batch=2, heads=2, shape=(5, 40), d=24), dtype, device)
    settings = {**ATTENTION.defaults, **options}
    needs = ATTENTION.NeedsGrad(*[i < 3 for i in range(8)])
    o, saved = ATTENTION._path.forward(needs, *args, **settings)
    kept = [t for t in saved if t is not None and all(t is not a for a in args)]
    if dtype is torch.float32:
        assert kept == []
    else:
        _, lse, low = kept
        assert kept[0] is o and lse.shape == (2, 2, 5) and lse.dtype == torch.float32
        assert low.dtype == dtype and low.stride() == o.stride()
    none = ATTENTION.NeedsGrad(*[False] * 8)
    assert ATTENTION._path.forward(none, *args, **settings)[1] == ()


@half_dtypes
def test_changing_a_result_in_place_is_an_error(device, dtype):
    """Backward needs the result, as that of PyTorch's own attention does."""
    args, options = sample(dict(batch=1, heads=1, shape=(5, 40), d=24), dtype, device)
    q, *rest = args
    o = ATTENTION.fast(q.requires_grad_(), *rest, **options)
    with torch.no_grad():
        o.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()
