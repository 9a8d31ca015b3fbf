"""`spatial_pool`: parity with transformers' poolings, bilinear weights, errors."""

import types

import pytest
import torch

from tests.ops.test_wrong_arguments import assert_refused
from vlm_fast.ops.declaration import OPS

OP = OPS["spatial_pool"]


def test_bilinear_matches_onevision():
    from transformers import LlavaOnevisionModel

    vision = types.SimpleNamespace(image_size=378, patch_size=14)
    model = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=vision))
    x = torch.randn(2, 27 * 27, 5)
    ours = OP.fast(x, height=27, width=27, mode="bilinear")
    assert ours.shape == (2, 14 * 14, 5)
    theirs = LlavaOnevisionModel.apply_pooling(model, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_windows_match_llava_next_video(mode):
    from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler

    vision = types.SimpleNamespace(image_size=24, patch_size=1, hidden_size=5)
    mode_there = {"avg": "average"}.get(mode, mode)
    config = types.SimpleNamespace(
        vision_config=vision, spatial_pool_mode=mode_there, spatial_pool_stride=2
    )
    x = torch.randn(2, 24 * 24, 5)
    ours = OP.fast(x, height=24, width=24, mode=mode)
    torch.testing.assert_close(ours, LlavaNextVideoPooler(config)(x), rtol=1e-6, atol=1e-6)


def test_ties_send_the_gradient_to_the_first_maximum():
    x = torch.zeros(1, 4, 1, requires_grad=True)
    OP.fast(x, height=2, width=2, mode="max").sum().backward()
    assert x.grad.flatten().tolist() == [1, 0, 0, 0]


MISTAKES = {
    "height": (dict(height=0), "height", "0"),
    "width": (dict(width=1), "width", "1", "2 or more"),
    "another grid": (dict(height=6), "x", "height * width = 42"),
    "mode": (dict(mode="sum"), "mode", "'sum'", "one of"),
    "no stride": (dict(stride=0), "stride", "1 to 8"),
    "too long a stride": (dict(stride=9), "stride", "1 to 8"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_invalid_arguments_raise(mistake):
    changes, *words = MISTAKES[mistake]
    options = dict(height=5, width=7, mode="avg", stride=2) | changes
    assert_refused(OP, (torch.randn(2, 35, 4),), options, ValueError, *words)


def test_input_without_batch_dimension():
    assert_refused(OP, (torch.randn(35, 4),), dict(height=5, width=7), ValueError, "x")
