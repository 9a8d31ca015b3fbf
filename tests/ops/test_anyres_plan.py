"""Token counts and index tables of AnyRes against transformers, which computes in floats."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaNextConfig, LlavaOnevisionConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from vlm_fast.ops import anyres_plan, anyres_tiling
from vlm_fast.ops.anyres_tiling import Stitched, Tiling, token_count

NEXT = Tiling(LlavaNextConfig().image_grid_pinpoints, tile=336, side=24)
ONEVISION = Tiling(LlavaOnevisionConfig().image_grid_pinpoints, tile=384, side=27, max_tiles=9)
GRANITE = [(384 * i, 384 * j) for i in range(1, 11) for j in range(1, 10 // i + 1)]
PUBLISHED = {
    "LLaVA-NeXT": NEXT,
    "LLaVA-OneVision": ONEVISION,
    "LLaVA-OneVision, max 4": Tiling(ONEVISION.pinpoints, tile=384, side=27, max_tiles=4),
    "ties to a later pinpoint": Tiling(ONEVISION.pinpoints[::-1], tile=384, side=27, max_tiles=9),
    "Granite Vision": Tiling(GRANITE, tile=384, side=27),
    "Granite 4 Vision": Tiling(GRANITE, tile=384, side=12),
}
each_tiling = pytest.mark.parametrize("tiling", PUBLISHED.values(), ids=PUBLISHED)


def transformers_count(size, tiling):
    """The token count by the methods of transformers' processors."""
    kind = LlavaNextProcessor if tiling.max_tiles is None else LlavaOnevisionProcessor
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=list(tiling.pinpoints)),
        patch_size=1,
        num_additional_image_tokens=0,
        num_image_tokens=tiling.side**2,
        vision_aspect_ratio=f"anyres_max_{tiling.max_tiles}",
    )
    processor._get_unpadded_features = lambda *args: kind._get_unpadded_features(processor, *args)
    # They take pixels; with a patch of one pixel the tile's side in tokens equals pixels.
    scale = tiling.tile // tiling.side if tiling.max_tiles is None else 1
    if scale > 1:
        best = select_best_resolution(size, tiling.pinpoints)
        tiles = best[0] // tiling.tile, best[1] // tiling.tile
        counts = processor._get_unpadded_features(*size, tiling.side, tiling.side, *tiles)
        return sum(counts) + tiling.side**2
    return kind._get_number_of_features(processor, *size, tiling.tile, tiling.tile)


# In integers a larger grid keeps more pixels; in floats one pixel and the tie are lost.
LOSSY = [(632, 1265), (1211, 2423), (1275, 2551), (1182, 2365)]


def random_sizes(count, seed, largest=4000):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(24, largest, (count, 2), generator=generator)


@each_tiling
def test_token_counts_match_processors(tiling):
    lengths = [*range(1, 40), *range(40, 12_000, 97)]
    thin = [(width, length) for width in (1, 2, 3, 7) for length in lengths]
    sizes = random_sizes(1500, seed=0).tolist()
    sizes += LOSSY + thin + [(w, h) for h, w in LOSSY + thin + sizes[:300]]
    sizes += [(tiling.tile * i, 100 * i) for i in range(1, 40)]
    for size in map(tuple, sizes):
        assert token_count(size, tiling) == transformers_count(size, tiling), size
        assert anyres_tiling.best_resolution(size, tiling.pinpoints) == select_best_resolution(
            size, tiling.pinpoints
        )
        assert anyres_tiling.tile_count(size, tiling) == image_size_to_num_patches(
            size, list(tiling.pinpoints), tiling.tile
        )


def unpadded_in_floats(sizes, grid):
    """``unpad_image`` of transformers, vectorised over sizes in float64."""
    height, width = sizes.double().unbind(1)
    rows, cols = grid
    wide = width / height > cols / rows
    found = torch.where(wide, height * (cols / width), width * (rows / height))
    near = (found - found.round()).abs() < 1e-6  # rounding to 7 digits changes no other value
    found[near] = torch.tensor([round(x, 7) for x in found[near].tolist()], dtype=torch.float64)
    found = found.trunc().long()
    padding = torch.where(wide, rows - found, cols - found) // 2
    return torch.where(wide, rows - 2 * padding, rows), torch.where(wide, cols, cols - 2 * padding)


def test_unpadded_grid_matches_transformers_for_a_million_sizes():
    """For every grid shape of the published pinpoints, with sizes at rounding edges."""
    grids = {
        (h // t.tile * t.side, w // t.tile * t.side)
        for t in PUBLISHED.values()
        for h, w in t.pinpoints
    }
    per_grid = math.ceil(1_000_000 / len(grids)) + 1000
    compared = 0
    for i, grid in enumerate(sorted(grids)):
        sizes = random_sizes(per_grid - 1000, seed=i)
        # Sizes whose scaled side is an integer, where floats may round the wrong way.
        steps = torch.arange(1, 501)
        edges = [torch.stack([steps * g, steps * grid[1 - k]], 1) for k, g in enumerate(grid)]
        sizes = torch.cat([sizes, *edges])
        rows, cols = unpadded_in_floats(sizes, grid)
        ours = [anyres_tiling.padding(tuple(size), grid) for size in sizes.tolist()]
        top, left = torch.tensor(ours).unbind(1)
        assert torch.equal(grid[0] - 2 * top, rows) and torch.equal(grid[1] - 2 * left, cols)
        compared += len(sizes)
    assert compared >= 1_000_000


def test_token_count_of_global_view_and_four_tiles():
    assert token_count((672, 672), NEXT) == 2880 + 48
    without = Tiling(NEXT.pinpoints, 336, 24, newline=False)
    assert token_count((672, 672), without) == 2880
    assert token_count((672, 672), NEXT, tiles=1) == 577
    assert token_count((336, 336), Tiling([(336, 336)], 336, 24)) == 2 * 576 + 24


def test_accepted_types_of_image_sizes():
    expected = ((640, 480), (31, 1000))
    tensor = torch.tensor(expected)
    for sizes in (expected, list(expected), tensor, list(tensor), tensor.numpy(), tensor.half()):
        assert anyres_tiling.sizes_of(sizes) == expected
    assert token_count(tensor[0], NEXT) == token_count([640, 480], NEXT)
    assert token_count(tensor[0].numpy(), NEXT) == token_count((640, 480), NEXT)


MISTAKES = {
    "no height": (lambda: token_count((0, 5), NEXT), ValueError, "positive"),
    "no width": (lambda: token_count((5, 0), NEXT), ValueError, "positive"),
    "a negative side": (lambda: anyres_plan.plan([(5, -1)], NEXT), ValueError, "positive"),
    "half a pixel": (lambda: token_count((5.5, 5), NEXT), TypeError, "whole"),
    "a tensor of floats": (
        lambda: anyres_tiling.sizes_of(torch.ones(2, 2) / 2), TypeError, "whole",
    ),
    "one size as if many": (lambda: anyres_tiling.sizes_of((640, 480)), TypeError, "each image"),
    "three sides": (lambda: anyres_tiling.sizes_of([(1, 2, 3)]), TypeError, "each image"),
    "tiles of another grid": (
        lambda: anyres_plan.plan([(672, 672)], NEXT, tiles=[3]),
        ValueError, r"3 tiles, expected the base and \(2, 2\)",
    ),
    "more counts than sizes": (
        lambda: anyres_plan.plan([(672, 672)], NEXT, tiles=[5, 5]), ValueError, "1 sizes, 2 counts",
    ),
    "pinpoints that are no tiles": (
        lambda: anyres_plan.plan([(500, 500)], Tiling([(500, 500)], 336, 24)), ValueError, "tiles",
    ),
    "no pinpoints": (lambda: Tiling([], 336, 24), ValueError, "positive"),
    "no side": (lambda: Tiling(NEXT.pinpoints, 336, 0), ValueError, "positive"),
    "no tiles": (lambda: Tiling(NEXT.pinpoints, 336, 24, max_tiles=0), ValueError, "positive"),
    "resized to nothing": (
        lambda: anyres_plan.plan([(1, 140)], Tiling([(11, 154)], 11, 11, max_tiles=1)),
        ValueError, "nothing is left",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_invalid_arguments_raise(mistake):
    call, exception, words = MISTAKES[mistake]
    with pytest.raises(exception, match=words):
        call()


@each_tiling
def test_tables_are_in_range_and_inverse(tiling):
    sizes = [tuple(s) for s in random_sizes(15, seed=1).tolist()]
    tiles = [1 if i % 7 == 0 else anyres_tiling.tile_count(s, tiling) for i, s in enumerate(sizes)]
    plan = anyres_plan.plan(sizes, tiling, tiles=tiles)
    assert plan.counts == tuple(
        token_count(size, tiling, tiles=n) for size, n in zip(sizes, tiles, strict=True)
    )
    forth, back = plan.tables[0], plan.tables[-1 if not plan.is_resized else 2]
    assert forth.dtype == back.dtype == torch.int32
    assert back.shape[0] == sum(tiles) * tiling.side**2
    assert forth.shape[0] == sum(plan.counts)
    assert forth.min() == -1 and forth.max() < back.shape[0] and back.max() < forth.shape[0]
    if not plan.is_resized:
        known = (forth >= 0).nonzero().flatten()
        assert torch.equal(back[forth[known].long()].long(), known)
        assert (back >= 0).sum() == known.numel()
        return
    # As matrices: backward weights are the transposed forward weights; rows sum to one.
    _, weights, _, back_weights = plan.tables
    matrix = as_matrix(forth, weights, back.shape[0])
    transposed = as_matrix(back, back_weights, forth.shape[0])
    difference = (matrix - transposed.t()).coalesce()
    assert difference.values().abs().max() <= 1
    totals = torch.where(forth[:, 0] < 0, 0, weights.long().sum(1))
    assert (totals[forth[:, 0] >= 0] - anyres_plan.ONE).abs().max() <= 4


def as_matrix(taps, weights, cols):
    row = torch.arange(taps.shape[0])[:, None].expand_as(taps)
    known = taps >= 0
    at = torch.stack([row[known], taps[known].long()])
    size = (taps.shape[0], cols)
    return torch.sparse_coo_tensor(at, weights[known].long(), size, check_invariants=True)


def test_plans_are_cached_and_usable_in_training():
    with torch.inference_mode():
        first = anyres_plan.plan([(672, 500)], NEXT)
    assert anyres_plan.plan([(672, 500)], NEXT).tables[0] is first.tables[0]
    assert not first.tables[0].is_inference()


def test_plans_made_while_tracing_are_not_cached():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        traced = anyres_plan.plan([(640, 100)], ONEVISION)
    assert isinstance(traced.tables[0], FakeTensor)
    real = anyres_plan.plan([(640, 100)], ONEVISION)
    assert not isinstance(real.tables[0], FakeTensor)
    assert real.tables[0].shape == traced.tables[0].shape


def test_long_grid_is_resized_along_both_axes():
    grid = anyres_tiling.stitched((2304, 2304), ONEVISION)
    assert grid == Stitched((6, 6), 0, 0, (162, 162), (81, 81))
    assert token_count((2304, 2304), ONEVISION) == 729 + 81 * 82
