"""The one kernel of media attention's gradients, where a row sees one tile of keys."""

import pytest
import torch

from tests.support.op_accuracy import assert_accurate
from vlm_fast.kernels import _media_cross_attention_backward
from vlm_fast.kernels._launcher import recording
from vlm_fast.kernels.media_cross_attention import (
    media_attention_backward,
    media_attention_forward,
)
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import tolerance

ATTENTION = OPS["media_cross_attention"]
KERNEL = "media_gradient_kernel"
pytestmark = pytest.mark.devices("interpreter", "cuda")


def sample(device, index, media=2, heads=1, dtype=torch.bfloat16, **options):
    """OpenFlamingo's 64 latents of 64 features, and a sample of tokens for each row of index."""
    index = torch.tensor(index, device=device)
    (q, k, v, *_), settings = ATTENTION.sample(
        dict(
            batch=index.shape[0], heads=heads, queries=index.shape[1], media=media,
            keys=64 * media, tokens_per_media=64, d=64, **options,
        ), dtype, device,
    )  # fmt: skip
    return (q, k, v, index, None), settings


def assert_accurate_by_one_kernel(args, options, **layouts):
    with recording() as launches:
        assert_accurate(ATTENTION, args, options, **layouts)
    names = {launch.kernel.name for launch in launches}
    assert KERNEL in names and not names & {"media_query_gradient_kernel"}


def runs(*lengths):
    """An index of so many tokens of each medium in turn; the first are of none."""
    return [medium for medium, length in enumerate(lengths) for _ in range(length)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "index, media",
    [
        ([runs(0, 257)], 1), ([runs(257)], 1), ([runs(0, 1)], 1), ([runs(1)], 2),
        ([runs(7, 3, 65, 1)], 3), ([runs(1, 64, 0, 128)], 4), ([runs(0, 0, 5), runs(5)], 2),
        ([runs(2, 66), runs(0, 0, 68)], 2),
    ],
    ids=["257 tokens", "none seen", "a token", "a token and no medium", "runs", "whole tiles",
         "a sample without", "two samples"],
)  # fmt: skip
def test_runs_of_tokens(device, index, media, dtype):
    assert_accurate_by_one_kernel(*sample(device, index, media, dtype=dtype))


@pytest.mark.parametrize(
    "index", [[1, 2] * 40, [2, 2, 0, 1, 1, 0, 2, 1] * 9, [*runs(3, 70)[::-1], 2]], ids=str
)
def test_tokens_of_a_medium_that_do_not_follow_each_other(device, index):
    assert_accurate_by_one_kernel(*sample(device, [index], heads=2), upstream="padded rows")


@pytest.mark.parametrize("splits", [2, 3, 16])
def test_splits(device, monkeypatch, splits):
    """Also where some have no token, and where a run lies in two."""
    monkeypatch.setattr(_media_cross_attention_backward, "row_splits", lambda *sizes: splits)
    index = [runs(5, 130, 9), [1, 2] * 72]
    assert_accurate_by_one_kernel(*sample(device, index), layout="padded rows")


def test_values_that_no_token_sees(device):
    """NaN in keys and values of a medium reaches no gradient if no token sees the medium."""
    (q, k, v, *rest), options = sample(device, [runs(3, 70)])
    k[:, :, 64:] = v[:, :, 64:] = torch.nan
    found = tolerance.outputs_and_gradients(ATTENTION.fast, (q, k, v, *rest), options)
    assert all(x.isfinite().all() for part in found for x in part)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_each_gradient_alone(device, wanted):
    args, options = sample(device, [runs(5, 70, 3)])
    _, every = tolerance.outputs_and_gradients(ATTENTION.fast, args, options)
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(args[:3])]
    o = ATTENTION.fast(*leaves, *args[3:], **options)
    o.backward(tolerance.random_upstream(o))
    for i, leaf in enumerate(leaves):
        assert leaf.grad is None if i not in wanted else torch.equal(leaf.grad, every[i])


def test_queries_that_are_far_apart(device):
    (q, *rest), options = sample(device, [runs(1, 2, 1)])
    far = torch.empty(4 * 2**23, dtype=q.dtype, device=device).as_strided(q.shape, (0, 0, 2**23, 1))
    far.copy_(q)
    close = tolerance.outputs_and_gradients(ATTENTION.fast, (q, *rest), options)[1]
    with recording() as launches:
        found = tolerance.outputs_and_gradients(
            ATTENTION.fast, (far, *rest), options, upstream=tolerance.random_upstream
        )[1]
    assert any(x.kernel.name == KERNEL and x.arguments["WIDE"] for x in launches)
    assert all(torch.equal(a, b) for a, b in zip(found, close, strict=True))


def test_media_that_do_not_exist(device):
    """An index that names one selects nothing."""
    args, options = sample(device, [runs(2, 5, 4, 3)])
    settings = {**ATTENTION.defaults, **options, "scale": 0.125}
    found = []
    for index in (args[3], torch.where(args[3] > 2, 0, args[3])):
        o, kept = media_attention_forward(*args[:3], index, None, **settings, keep=True)
        found.append(
            media_attention_backward(
                o, *args[:3], index, None, **settings, want_q=True, want_kv=True, kept=kept
            )[:3]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not found[0][0][:, :, -3:].any() and not found[0][0][:, :, :2].any()


def test_the_forward_keeps_nothing_but_the_log_sum_exp(device):
    args, options = sample(device, [runs(5, 4)])
    _, kept = media_attention_forward(
        *args, **{**ATTENTION.defaults, **options, "scale": 1.0}, keep=True
    )
    assert kept[0] is None and kept[2] is None and kept[1].shape == args[0].shape[:3]
