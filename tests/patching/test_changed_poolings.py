"""A pooling that changes after its first calls is seen, as before they remembered anything."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlavaNextVideoConfig
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler

import vlm_fast

pytestmark = pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")
X = torch.linspace(-1, 1, 2 * 36 * 8).sin().view(2, 36, 8)


def overlap(pooler):
    pooler.pool.stride = 1


def larger_windows(pooler):
    pooler.pool.kernel_size = pooler.pool.stride = 3


def hook(pooler):
    pooler.pool.register_forward_hook(lambda module, args, result: result * 2)


def maximum(pooler):
    pooler.pool = nn.MaxPool2d(2)


@pytest.mark.parametrize("change", [overlap, larger_windows, hook, maximum])
def test_changed_pooler_is_asked_again(change):
    config = LlavaNextVideoConfig(
        spatial_pool_mode="average", spatial_pool_stride=2,
        vision_config=dict(model_type="clip_vision_model", image_size=24, patch_size=4),
    )  # fmt: skip
    plain = LlavaNextVideoPooler(config)
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast, strict=True)
    for _ in range(2):
        torch.testing.assert_close(fast(X), plain(X))
    before = fast(X)
    for module in (plain, fast):
        change(module)
    torch.testing.assert_close(fast(X), plain(X))
    assert fast(X).shape != before.shape or not torch.equal(fast(X), before)
