"""Token matching and merging on the CPU: match verification, errors, memory and threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.test_saved_bytes import saved_bytes
from tests.support.cases import OPS
from vlm_fast import ops
from vlm_fast.devtools.memory import peak_bytes
from vlm_fast.kernels._nearest_tokens import TILE
from vlm_fast.verification import tolerance

MATCH, MERGE = OPS["bipartite_match"], OPS["merge_tokens"]


@given(
    tokens=st.integers(1, 12), r=st.integers(0, 8), protected=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_match_is_a_partition_and_conserves_sizes(tokens, r, protected, seed):
    generator = torch.Generator().manual_seed(seed)
    protected = min(protected, tokens)
    metric = torch.randint(-2, 3, (2, tokens, 3), generator=generator).float()
    size = torch.randint(1, 100, (2, tokens), generator=generator).float()
    match = ops.bipartite_match.fast(metric, r=r, protected=protected)
    assert all(v.ok for v in MATCH.verify(match, metric, r=r, protected=protected))
    merged, total = ops.merge_tokens.fast(metric, match, size)
    assert torch.equal(total.sum(1), size.sum(1))
    assert merged.shape[1] == tokens - min(r, (tokens - protected) // 2)
    # Each mean is rounded once, by half an ulp of at most the sum of its group's magnitudes.
    weighted = metric * size[..., None]
    allowed = 2 * torch.finfo(torch.float32).eps * weighted.abs().sum(1).max().item()
    torch.testing.assert_close(
        (merged * total[..., None]).sum(1), weighted.sum(1), rtol=0, atol=allowed
    )


def corrupted(match, how):
    destination, order, start = (t.clone() for t in match)
    if how == "another partner":
        destination[0, 0], destination[0, 2] = destination[0, 2].clone(), destination[0, 0].clone()
    elif how == "order":
        order[:, :2] = order[:, :2].flip(1)
    else:
        start[:, 1] += 1
    return destination, order, start


@pytest.mark.parametrize("how", ["another partner", "order", "start"])
def test_invalid_match_is_detected(how):
    (metric,), options = MATCH.sample(MATCH.usual_shape)
    match = MATCH.fast(metric, **options)
    options = {**MATCH.defaults, **options}
    assert all(v.ok for v in MATCH.verify(match, metric, **options))
    assert not all(v.ok for v in MATCH.verify(corrupted(match, how), metric, **options))


def test_match_of_less_similar_tokens_is_detected():
    """A valid match of less similar tokens."""
    (metric,), options = MATCH.sample(MATCH.usual_shape)
    options = {**MATCH.defaults, **options}
    for other in (metric.roll(2, 1), torch.randn_like(metric)):
        match = MATCH.fast(other, **options)
        assert not all(v.ok for v in MATCH.verify(match, metric, **options))


@pytest.mark.parametrize(
    "options, exception, words",
    [
        (dict(r=-1), ValueError, "r is -1"),
        (dict(r=2.0), TypeError, "r is 2.0"),
        (dict(r=True), TypeError, "r is True"),
        (dict(r=2, protected=-1), ValueError, "protected is -1"),
        (dict(r=2, protected=18), ValueError, "protected is 18"),
        (dict(r=2, protected=torch.tensor(1)), TypeError, "protected"),
    ],
)
def test_invalid_options_raise(options, exception, words):
    metric = torch.randn(2, 17, 4)
    for call in (ops.bipartite_match, ops.bipartite_match.fast):
        with pytest.raises(exception, match=rf"vlm_fast\.bipartite_match: .*{words}.*expected"):
            call(metric, **options)


@pytest.mark.parametrize(
    "change, exception, words",
    [
        (lambda x, m, s: (x, m[:2], s), ValueError, "match is 2"),
        (lambda x, m, s: (x, m[0], s), ValueError, "match is 1"),
        (lambda x, m, s: (x[:, 1:], m, s), ValueError, "destination"),
        (lambda x, m, s: (x, [m[0], m[1][:, 1:], m[2]], s), ValueError, "order"),
        (lambda x, m, s: (x, [m[0], m[1], m[2][:, :0]], s), ValueError, "start"),
        (lambda x, m, s: (x, [m[0], m[1], m[2].repeat(1, 2)], s), ValueError, "start"),
        (lambda x, m, s: (x, [m[0], m[1].long(), m[2]], s), TypeError, "order"),
        (lambda x, m, s: (x, m, s[:, 1:]), ValueError, "size"),
        (lambda x, m, s: (x, m, s.half()), TypeError, "size"),
    ],
)
def test_mismatched_match_raises(change, exception, words):
    x = torch.randn(2, 17, 4)
    arguments = change(x, list(ops.bipartite_match(x, r=3)), torch.ones(2, 17))
    with pytest.raises(exception, match=rf"vlm_fast\.merge_tokens: .*{words}.*expected"):
        ops.merge_tokens(*arguments)


def test_match_is_not_differentiable():
    x = torch.randn(2, 9, 4, requires_grad=True)
    match = ops.bipartite_match(x, r=3)
    assert not any(t.requires_grad for t in match)
    merged, _ = ops.merge_tokens(x, match)
    merged.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_scores_are_allocated_one_tile_at_a_time():
    x = torch.randn(2, 2000, 8)
    most = peak_bytes(lambda: ops.bipartite_match.fast(x, r=1000), "cpu")
    assert most <= 4 * TILE + 30 * x.shape[0] * x.shape[1]  # all scores of an image take 4 MB


@pytest.mark.parametrize("tokens", [1400, 8000], ids=["threads", "huge pages"])
def test_results_do_not_depend_on_thread_count(tokens):
    """Sizes at which the compiled code uses several threads and huge pages."""
    shape = dict(batch=1, tokens=tokens, features=1200, r=tokens // 9, sized=True)
    args, options = MERGE.sample(shape)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results, gradients = tolerance.outputs_and_gradients(MERGE.fast, args, options)
        found.append([*results, *gradients, *ops.bipartite_match.fast(args[0][:, :40], r=9)])
    torch.set_num_threads(before)
    assert all(map(torch.equal, *found))
    expected = tolerance.outputs_and_gradients(MERGE.reference, args, options)
    for one, other in zip(found[0], expected[0] + expected[1], strict=False):
        torch.testing.assert_close(one, other)


def test_merge_saves_four_bytes_per_token():
    args, options = MERGE.sample(dict(batch=3, tokens=17, features=24, r=5))
    assert saved_bytes(MERGE, args, options) == 4 * 3 * 17 + 4 * 3 * 12
