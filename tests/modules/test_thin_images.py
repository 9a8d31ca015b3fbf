"""Images so thin that no pixel or token remains on the grid: the same results as transformers."""

import copy

import numpy as np
import pytest
import torch
import transformers

import vlm_fast
from tests.ops.test_anyres_packing import model_of, packed
from tests.ops.test_anyres_plan import NEXT, ONEVISION, PUBLISHED
from tests.patching.test_anyres_models import MIXINS
from tests.support.tiny_anyres import PINPOINTS, TILE, granite, tiling_model
from tests.support.tiny_models import IMAGE
from tests.support.ways_to_run import full_step
from vlm_fast.ops import anyres_tiling
from vlm_fast.verification import tolerance

REPORTED = {(1, 2305): 576, (2760, 1): 600, (3, 2000): 576}  # tokens of LLaVA-NeXT


THIN = [(1, 300), (1, 2305), (2, 1000), (2, 4000), (3, 2000), (5, 9000), (1, 100_000)]
THIN += [(w, h) for h, w in THIN]


def test_known_token_counts():
    assert {size: anyres_tiling.token_count(size, NEXT) for size in REPORTED} == REPORTED


@pytest.mark.parametrize("size", REPORTED)
def test_tile_counts_match_image_processors(size):
    picture = np.zeros((*size, 3), np.uint8)
    for kind, tiling in (
        (transformers.LlavaNextImageProcessorPil, NEXT),
        (transformers.LlavaOnevisionImageProcessorPil, ONEVISION),
    ):
        side = dict(height=tiling.tile, width=tiling.tile)
        processor = kind(
            size=side, crop_size=side, image_grid_pinpoints=list(map(list, tiling.pinpoints))
        )
        pixels = processor(picture, input_data_format="channels_last", return_tensors="pt")[
            "pixel_values"
        ]
        assert pixels.shape[1] == anyres_tiling.tile_count(size, tiling)


def with_grid(name, tiling):
    """A tiny model with a published grid in its config, used to pack given features."""
    model = granite().model if name == "granite4_vision" else model_of(name)
    config, granites = model.config, name == "granite4_vision"
    config.image_grid_pinpoints = list(map(list, tiling.pinpoints))
    config.vision_config.image_size = tiling.tile
    config.vision_config.patch_size = tiling.tile // (tiling.side * (2 if granites else 1))
    return model


MODELS = {
    "llava_next": PUBLISHED["LLaVA-NeXT"],
    "llava_next_video": PUBLISHED["Granite Vision"],
    "llava_onevision": PUBLISHED["LLaVA-OneVision"],
    "granite4_vision": PUBLISHED["Granite 4 Vision"],
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_features_and_their_gradients(name):
    tiling = MODELS[name]
    plain = with_grid(name, tiling)
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast)
    sizes = [*THIN, (500, 700)]
    for batch in ([size] for size in THIN), [sizes]:
        for sizes in batch:
            tiles = [anyres_tiling.tile_count(size, tiling) for size in sizes]
            features = torch.randn(sum(tiles), tiling.side**2, 2)
            newline = torch.randn(2)

            def run(model, features, newline, tiles=tiles, sizes=sizes):
                parts = torch.split(features * 1, tiles)
                return packed(model, parts, torch.tensor(sizes), newline)

            with vlm_fast.strict():
                assert run(fast, features, newline)[1].tolist() == [
                    anyres_tiling.token_count(size, tiling) for size in sizes
                ]
                ours = results(run, fast, features, newline)
            native = results(run, plain, features, newline)
            exact = results(run, plain, features.double(), newline.double())
            for i, triple in enumerate(zip(ours, native, exact, strict=True)):
                verdict = tolerance.judge(f"{sizes}: {i}", *triple, gradient=i > 0)
                assert verdict.ok, verdict


def results(run, model, *tensors):
    outputs, gradients = tolerance.outputs_and_gradients(lambda *t: run(model, *t)[0], tensors, {})
    return [*outputs, *gradients]


@pytest.mark.parametrize("name", MIXINS)
def test_models_match_unpatched(name):
    """Batches of a thin and an ordinary image, and of thin images only."""
    model, side = tiling_model(name)
    fast = copy.deepcopy(model)
    vlm_fast.patch(fast)
    tiling = anyres_tiling.Tiling(PINPOINTS, TILE, side, 9 if "onevision" in name else None)
    for sizes in ([[1, 150], [33, 47]], [[300, 1], [2, 999]]):
        assert 0 in anyres_tiling.stitched(tuple(sizes[0]), tiling).kept
        tiles = [anyres_tiling.tile_count(tuple(size), tiling) for size in sizes]
        ids = torch.randint(3, 90, (2, 140))
        for row, size in zip(ids, sizes, strict=True):
            row[4 : 4 + anyres_tiling.token_count(size, tiling)] = IMAGE
        pixels = torch.randn(2, max(tiles), 3, TILE, TILE)
        given = dict(input_ids=ids, pixel_values=pixels, image_sizes=torch.tensor(sizes))
        before = full_step(model, given)
        with vlm_fast.strict():
            after = full_step(fast, given)
        assert after.keys() == before.keys()
        for where, value in after.items():
            torch.testing.assert_close(value, before[where], rtol=1e-4, atol=2e-5)


def test_ties_take_the_first_smallest_pinpoint():
    """If no pixel remains on any grid, the first of the smallest grids is chosen."""
    pinpoints = ((672, 336), (336, 672), (672, 672))
    for size in (THIN[1], (100_000, 1)):
        assert anyres_tiling.best_resolution(size, pinpoints) == (672, 336)
        assert anyres_tiling.best_resolution(size, pinpoints[::-1]) == (336, 672)
