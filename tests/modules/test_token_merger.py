"""TokenMerger, TokenBudget and proportional attention to merged tokens."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.dispatch_modes import RecordingMode
from vlm_fast import ops
from vlm_fast.kernels import _launcher
from vlm_fast.kernels._triton import AVAILABLE, INTERPRETED
from vlm_fast.modules import (
    MLPProjector,
    PerceiverResampler,
    PixelShuffleConnector,
    PixelShuffleMLP,
    PixelShuffleProjector,
    PooledMLPProjector,
    PooledNormProjector,
    SpatialPool,
    TokenBudget,
    TokenMerger,
    proportional_bias,
)
from vlm_fast.modules.token_budget import pooled_grid

# ---- TokenMerger ----


@pytest.mark.parametrize(
    "options, tokens, kept",
    [
        (dict(ratio=2), 576, 288), (dict(ratio=4), 576, 144), (dict(ratio=3), 10, 4),
        (dict(ratio=2, protected=1), 577, 289), (dict(ratio=1), 7, 7), (dict(ratio=2.5), 100, 40),
        (dict(keep=64), 576, 64), (dict(keep=1), 33, 1), (dict(keep=64), 50, 50),
        (dict(keep=2, protected=1), 17, 2), (dict(ratio=4, protected=3), 3, 3),
    ],
)  # fmt: skip
def test_merger_output_length(options, tokens, kept):
    merger = TokenMerger(**options)
    x = torch.randn(2, tokens, 8)
    merged = merger.merge(x)
    assert merger(x).shape == merged.tokens.shape == (2, kept, 8)
    if kept < tokens:
        assert merged.size.sum(1).tolist() == [tokens, tokens]
    protected = options.get("protected", 0)
    first = {0: 0, 1: 1, 3: 1}[protected]
    assert torch.equal(merged.tokens[:, :first], x[:, :first])


def test_merger_equals_rounds_of_ops():
    x, metric = torch.randn(2, 33, 8), torch.randn(2, 33, 5)
    size = torch.randint(1, 4, (2, 33)).float()
    merged = TokenMerger(keep=12).merge(x, metric, size)
    match = ops.bipartite_match(metric, r=16)
    metric = ops.merge_tokens(metric, match, size)[0]
    once, sizes = ops.merge_tokens(x, match, size)
    tokens, sizes = ops.merge_tokens(once, ops.bipartite_match(metric, r=5), sizes)
    assert torch.equal(merged.tokens, tokens) and torch.equal(merged.size, sizes)


@pytest.mark.parametrize("registered", [False, True], ids=["direct", "registered"])
@pytest.mark.parametrize("sized", [False, True], ids=["counts", "sizes with gradients"])
def test_sizes_require_grad_only_if_input_sizes_do(sized, registered):
    """Otherwise the next merge would save its tokens for the gradient of the sizes."""
    x = torch.randn(2, 12, 8, requires_grad=True)
    size = torch.ones(2, 12, requires_grad=sized)
    with RecordingMode() if registered else contextlib.nullcontext():
        match = ops.bipartite_match(x, r=6)
        results = [
            ops.merge_tokens(x, match, size),
            *([] if sized else [ops.merge_tokens(x, match)]),
        ]
    for merged, total in results:
        assert merged.requires_grad and total.requires_grad == sized
        (merged.sum() + total.sum()).backward()
    assert x.grad is not None and (size.grad is not None) == sized


def test_merger_between_a_tower_and_a_projector():
    projector = torch.nn.Sequential(TokenMerger(ratio=4), MLPProjector(16, 24))
    x = torch.randn(2, 20, 16, requires_grad=True)
    found = projector(x)
    assert found.shape == (2, 5, 24)
    assert torch.autograd.grad(found.square().sum(), x)[0].any(-1).all()
    assert not projector[0].state_dict()


def test_merger_compiles_to_one_graph():
    merger, x = TokenMerger(ratio=4), torch.randn(2, 20, 16, requires_grad=True)
    compiled = torch.compile(merger, fullgraph=True, backend="aot_eager")
    results = [module(x) for module in (merger, compiled)]
    grads = [torch.autograd.grad(result.square().sum(), x)[0] for result in results]
    assert torch.equal(*results) and torch.equal(*grads)


@pytest.mark.parametrize(
    "options",
    [
        {}, dict(ratio=2, keep=3), dict(ratio=0.5), dict(ratio=float("nan")),
        dict(ratio=2, protected=-1), dict(keep=0), dict(keep=2, protected=2),
    ],
)  # fmt: skip
def test_invalid_merger_options_raise(options):
    with pytest.raises(ValueError, match=r"vlm_fast\.TokenMerger"):
        TokenMerger(**options)


def test_merger_refuses_mismatched_inputs():
    merger = TokenMerger(2, protected=2)
    with pytest.raises(TypeError, match="TokenMerger: x is"):
        merger([1.0])
    for x, metric in (
        (torch.randn(9, 4), None), (torch.randn(2, 1, 4), None),
        (torch.randn(2, 9, 4), torch.randn(2, 8, 4)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="TokenMerger"):
            merger(x, metric)


# ---- proportional attention ----


def heads(batch, tokens, seed):
    x = torch.randn(batch, 2, tokens, 8, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_()


def test_proportional_attention_equals_attention_to_all_copies():
    """Merged equal keys have the weight of all copies: same results and query gradients."""
    q, k, v = heads(2, 3, 0), heads(2, 4, 1), heads(2, 4, 2)
    copies = torch.tensor([3, 1, 2, 5])
    all_copies = [t.repeat_interleave(copies, 2) for t in (k, v)]
    expected = ops.cross_attention(q, *all_copies)
    bias = proportional_bias(copies.float().expand(2, 4))
    found = ops.cross_attention(q, k, v, bias=bias)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.sum(), (q, k, v)),
        torch.autograd.grad(expected.sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_proportional_self_attention():
    x, size = torch.randn(2, 5, 16), torch.randint(1, 5, (2, 5)).float()
    parameters = [torch.randn(16, 16) * 0.2 for _ in range(3)] + [torch.randn(16)] * 3
    found = ops.self_attention(x, parameters, proportional_bias(size), heads=2)
    full = size.log()[:, None, None].expand(2, 2, 5, 5).contiguous()
    assert torch.equal(found, ops.self_attention(x, parameters, full, heads=2))


def test_attention_bias_has_one_constant_per_key():
    size = torch.ones(2, 5, requires_grad=True)
    bias = proportional_bias(size)
    assert bias.shape == (2, 1, 1, 5) and not bias.requires_grad


@pytest.mark.skipif(not AVAILABLE or INTERPRETED, reason="launches of the compiled kernels")
def test_kernels_read_broadcast_bias_without_copy():
    with FakeTensorMode(), torch.no_grad(), _launcher.recording() as launches:
        q, k, v = (torch.empty(2, 12, n, 64, device="cuda") for n in (32, 257, 257))
        bias = proportional_bias(torch.empty(2, 257, device="cuda"))
        assert ops.cross_attention.why_not(q, k, v, bias=bias) is None
        ops.cross_attention.fast(q, k, v, bias=bias)
    (given,) = [la.arguments for la in launches if la.kernel.name == "cross_attention_kernel"]
    assert given["bias_ptr"].numel() == 2 * 257
    assert [given[f"bias_{axis}"] for axis in ("batch", "head", "query", "key")] == [257, 0, 0, 1]


# ---- TokenBudget ----


@pytest.mark.parametrize("method", ["pool", "merge", "resample"])
def test_token_budget_is_kept(method):
    budget = TokenBudget(16, method, dim=24 if method == "resample" else None)
    x = torch.randn(2, 36, 24, requires_grad=True)
    found = budget(x)
    assert found.shape == (2, 16, 24)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    assert gradient.any(-1).all()
    few = torch.randn(2, 9, 24)
    assert budget(few).shape == (2, 16 if method == "resample" else 9, 24)


def test_budget_pooling_averages_cells():
    x = torch.randn(2, 24, 5)
    image = x.view(2, 4, 6, 5)
    expected = image.view(2, 2, 2, 3, 2, 5).mean((2, 4)).flatten(1, 2)
    found = TokenBudget(6)(x, (4, 6))
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()
    assert torch.equal(TokenBudget(6, "merge")(x), TokenMerger(keep=6)(x))


@pytest.mark.parametrize(
    "n, grid, cells",
    [
        (144, (24, 24), (12, 12)), (6, (4, 6), (2, 3)), (64, (27, 27), (8, 8)),
        (8, (24, 24), (2, 4)), (2, (2, 100), (1, 2)), (7, (3, 9), (1, 7)),
    ],
)  # fmt: skip
def test_budget_cells_follow_grid_shape(n, grid, cells):
    assert pooled_grid(n, grid) == cells


def test_budget_passes_options_to_resampler():
    budget = TokenBudget(4, "resample", dim=16, depth=3, heads=2, dim_head=8)
    assert isinstance(budget.resampler, PerceiverResampler) and len(budget.resampler.layers) == 3


@pytest.mark.parametrize(
    "options, exception",
    [
        (dict(n=0), ValueError), (dict(n=4, method="prune"), ValueError),
        (dict(n=4, method="resample"), TypeError), (dict(n=4, method="pool", dim=8), TypeError),
        (dict(n=4, method="merge", depth=2), TypeError),
    ],
)  # fmt: skip
def test_invalid_budgets_raise(options, exception):
    with pytest.raises(exception, match=r"vlm_fast\.TokenBudget"):
        TokenBudget(**options)


def test_budget_refuses_mismatched_inputs():
    for x, grid in (
        (torch.randn(36, 8), None), (torch.randn(2, 35, 8), None), (torch.randn(2, 36, 8), (5, 7)),
        (torch.randn(2, 12, 8), (2, 6)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="TokenBudget"):
            TokenBudget(11)(x, grid)
    with pytest.raises(TypeError, match="TokenBudget"):
        TokenBudget(4)(None)


def test_nonsquare_token_count_error_does_not_mention_grid():
    for tokens, side in ((577, 24), (730, 27)):
        with pytest.raises(
            ValueError, match=rf"TokenBudget: x is .*a square of tokens.*{side}\*\*2"
        ):
            TokenBudget(144)(torch.randn(1, tokens, 8))
    with pytest.raises(ValueError, match=r"TokenBudget: grid is \(24, 24\), .* 577"):
        TokenBudget(144)(torch.randn(1, 577, 8), (24, 24))


GRIDS = {
    "pool": lambda: SpatialPool(2),
    "pool, then project": lambda: PooledMLPProjector(8, 8, 8, stride=2),
    "pool, then norm": lambda: PooledNormProjector(8, 8, stride=2),
    "shuffle, then norm": lambda: PixelShuffleProjector(8, 8, factor=2),
    "shuffle": lambda: PixelShuffleConnector(8, 8, factor=2),
    "shuffle, then project": lambda: PixelShuffleMLP(8, 8, factor=2),
    "budget": lambda: TokenBudget(4, "pool"),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grid_modules_refuse_merged_tokens(name):
    x, after = torch.randn(2, 64, 8), GRIDS[name]()
    for merging in (TokenMerger(keep=16), TokenMerger(ratio=4), TokenBudget(16, "merge")):
        with pytest.raises(ValueError, match=r"x is .*row by row of a grid; merged ones are in no"):
            torch.nn.Sequential(merging, after)(x)
    if name != "budget":  # an explicit grid does not help either
        with pytest.raises(ValueError, match="merged ones are in no order"):
            after(TokenMerger(keep=16)(x), 4, 4)
    assert torch.equal(torch.nn.Sequential(TokenMerger(keep=64), after)(x), after(x))  # none merged
    torch.nn.Sequential(after, TokenMerger(keep=2))(x)


def over(count, *tensors):
    """Call function on several random inputs, with vmap and one by one."""
    return [torch.stack([t.roll(i) * (1 + i) for i in range(count)]) for t in tensors]


@pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")
@pytest.mark.parametrize("tokens, protected", [(17, 0), (18, 1), (1, 0)])
def test_vmap_matches_each(tokens, protected):
    (x,) = over(3, torch.randn(2, tokens, 5))
    call = lambda x: ops.bipartite_match(x, r=6, protected=protected)  # noqa: E731
    for i, one in enumerate(zip(*torch.vmap(call)(x), strict=True)):
        for ours, theirs in zip(one, call(x[i]), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")
@pytest.mark.parametrize("chunk", [None, 2])
def test_vmap_over_a_merger(chunk):
    merger = TokenMerger(keep=5, protected=1)
    x, metric = over(3, torch.randn(2, 17, 6), torch.randn(2, 17, 4))
    size = torch.rand(3, 2, 17) + 1
    found = torch.vmap(merger.merge, chunk_size=chunk)(x, metric, size)
    for i in range(3):
        expected = merger.merge(x[i], metric[i], size[i])
        torch.testing.assert_close(found.tokens[i], expected.tokens)
        torch.testing.assert_close(found.size[i], expected.size)
    grads = torch.vmap(torch.func.grad(lambda x: merger(x).square().sum()))(x)
    for i, grad in enumerate(grads):
        leaf = x[i].clone().requires_grad_()
        torch.testing.assert_close(
            grad, torch.autograd.grad(merger(leaf).square().sum(), leaf)[0]
        )  # fmt: skip
