"""Token merging follows the paper's algorithm (arXiv 2210.09461), on each device."""

from __future__ import annotations

import pytest
import torch

from tests.support.guard_bands import GuardBands
from tests.support.op_accuracy import assert_accurate
from vlm_fast import ops
from vlm_fast.kernels import _nearest_tokens
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import tolerance

pytestmark = [pytest.mark.devices("cpu", "interpreter", "cuda"), pytest.mark.aten]

WIDTH = 6


def papers_algorithm(metric, r, protected):
    """The algorithm of arXiv 2210.09461, section 3, for one image in float64.

    Returns a list of token indices for each merged token: first the tokens of A that are kept, then
    each token of B with those merged into it.
    """
    unit = [v / max(v.norm().item(), 1e-12) for v in metric.double()]
    tokens = len(unit)
    a = [i for i in range(0, tokens, 2) if i >= protected]
    b = [i for i in range(1, tokens, 2) if i >= protected]
    r = min(r, (tokens - protected) // 2)
    edges = []  # 2. one from each token of A to its most similar token of B
    for i in a if r else []:
        similarities = [(unit[i] @ unit[j]).item() for j in b]
        best = max(similarities)
        edges.append((best, i, b[similarities.index(best)]))
    edges.sort(key=lambda edge: (-edge[0], edge[1]))
    joins = {i: j for _, i, j in edges[:r]}  # 3. the r most similar edges
    left = [[i] for i in range(0, tokens, 2) if i not in joins]
    return left + [[j, *sorted(i for i in joins if joins[i] == j)] for j in range(1, tokens, 2)]


def assert_match(match, groups):
    destination, order, start = (t.tolist() for t in match)
    assert order == [i for group in groups for i in group]
    assert start == [sum(map(len, groups[:j])) for j in range(len(groups) + 1)]
    assert destination == [
        next(j for j, group in enumerate(groups) if i in group) for i in range(len(order))
    ]


def assert_equal_to_the_paper(device, metric, r, protected):
    match = ops.bipartite_match.fast(metric.to(device), r=r, protected=protected)
    for image, *found in zip(metric, *match, strict=True):
        assert_match(found, papers_algorithm(image, r, protected))
    return match


@pytest.mark.parametrize("protected", [0, 1, 2, 3])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 8, 9])
def test_matching_follows_the_paper(device, tokens, protected):
    metric = torch.randn(2, tokens, WIDTH)
    if protected > tokens:
        return
    for r in range((tokens - protected) // 2 + 1):
        assert_equal_to_the_paper(device, metric, r, protected)


def test_r_is_capped_at_half(device):
    metric = torch.randn(1, 9, WIDTH)
    for protected, most in ((0, 4), (1, 4), (2, 3)):
        match = assert_equal_to_the_paper(device, metric, 10**6, protected)
        assert match[2].shape == (1, 9 - most + 1)


def test_ties_go_to_the_lower_index(device):
    """Tokens are unit vectors along axes, so similarities are exactly 0 or 1 with many ties."""
    metric = torch.eye(WIDTH)[torch.tensor([[0, 1, 0, 1, 1, 0, 2, 0, 1, 1], [3] * 10])]
    for r in range(6):
        assert_equal_to_the_paper(device, metric, r, 0)
        assert_equal_to_the_paper(device, metric, r, 1)
    zeros = torch.zeros(1, 6, WIDTH)
    match = ops.bipartite_match.fast(zeros.to(device), r=2)
    assert_match([t[0] for t in match], [[4], [1, 0, 2], [3], [5]])


def test_ties_across_tiles_go_to_the_lower_index(device):
    metric = torch.eye(WIDTH)[torch.arange(140) * 7 % 5].expand(1, -1, -1)
    assert_equal_to_the_paper(device, metric, 40, 1)
    assert_equal_to_the_paper(device, torch.zeros(1, 140, 2), 40, 0)


@pytest.mark.devices("interpreter", "cuda")  # a CPU has no configs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens, features", [(257, 72), (577, 40), (729, 17)])
@pytest.mark.parametrize("config", range(2))
def test_every_config_finds_the_nearest(device, monkeypatch, config, tokens, features, dtype):
    """Also with zero rows, equal rows in different tiles, and rows that are not contiguous."""
    monkeypatch.setattr(_nearest_tokens.nearest_kernel, "choose", lambda size: config)
    metric = torch.randn(2, tokens, 2 * features, device=device).to(dtype)[..., :features]
    metric[0, 5:9] = 0
    metric[1, 200:] = metric[1, :-200].clone()
    assert_accurate(OPS["bipartite_match"], (metric,), {"r": tokens // 3, "protected": 1})


def test_nan_similarity_ranks_last(device):
    metric = torch.randn(1, 8, WIDTH)
    metric[0, 2], metric[0, 5, 0] = torch.nan, torch.inf
    match = ops.bipartite_match.fast(metric.to(device), r=3)
    groups = [match[1][0, i:j].tolist() for i, j in zip(match[2][0], match[2][0, 1:], strict=False)]
    assert groups[0] == [2] and [5] in groups
    # They merge if no other tokens are left.
    match = ops.bipartite_match.fast(metric.to(device), r=4)
    assert match[1][0].sort().values.tolist() == list(range(8))


@pytest.mark.parametrize("sized", [False, True], ids=["sizes of 1", "sizes"])
def test_merged_tokens_are_means_weighted_by_size(device, sized):
    x, metric = torch.randn(2, 9, 5), torch.randn(2, 9, WIDTH)
    size = torch.randint(1, 9, (2, 9)).float() if sized else None
    match = ops.bipartite_match.fast(metric.to(device), r=4)
    merged, total = ops.merge_tokens.fast(
        x.to(device), match, None if size is None else size.to(device)
    )
    weight = torch.ones(2, 9) if size is None else size
    for image in range(2):
        for j, group in enumerate(papers_algorithm(metric[image], 4, 0)):
            w = weight[image, group].double()
            exact = (w[:, None] * x[image, group].double()).sum(0) / w.sum()
            native = ((w[:, None].float() * x[image, group]).sum(0) / w.sum().float()).cpu()
            assert tolerance.judge(str(group), merged[image, j].cpu(), native, exact).ok
            assert total[image, j].item() == w.sum().item()
            if len(group) == 1:
                assert torch.equal(merged[image, j].cpu(), x[image, group[0]])


def test_equal_tokens_survive_merge_and_unmerge(device):
    # Neighbours are equal in pairs, so merging half of the tokens loses nothing.
    x = torch.randn(2, 6, 5).repeat_interleave(2, 1).to(device)
    match = ops.bipartite_match.fast(x, r=6)
    merged, size = ops.merge_tokens.fast(x, match)
    assert (size == 2).all()
    assert torch.equal(ops.unmerge_tokens.fast(merged, match), x)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=str)
def test_merging_one_or_no_token(device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    match = ops.bipartite_match(x, r=1)
    merged, total = ops.merge_tokens(x, match)
    back = ops.unmerge_tokens(merged, match)
    assert merged.shape == (shape[0], max(shape[1] - 1, 0), shape[2]) and back.shape == shape
    assert total.sum().item() == shape[0] * shape[1]
    assert torch.autograd.grad(back.sum(), x)[0].shape == shape


@pytest.mark.parametrize("part", range(3), ids=["destination", "order", "start"])
def test_numbers_out_of_range_touch_no_memory_outside(device, part):
    with GuardBands() as bands:
        x = bands.lay_out(torch.randn(1, 6, 40, device=device), "dense")
        match = [bands.lay_out(t, "dense") for t in ops.bipartite_match.fast(x, r=2)]
        merged = torch.randn(1, 4, 40, device=device)
        for number in (-(2**31), -1, 6, 2**31 - 1):
            wrong = match[part].clone()
            wrong[0, -1] = number
            bad = [*match[:part], wrong, *match[part + 1 :]]
            for call in (
                lambda bad=bad: ops.merge_tokens.fast(x, bad),
                lambda bad=bad: ops.unmerge_tokens.fast(merged, bad),
            ):
                try:
                    call()
                except (IndexError, RuntimeError):
                    continue  # the CPU raises; a GPU skips the row
    bands.check()
