"""Projectors behind a pixel shuffle, against the transformers classes."""

import types

import pytest
import torch
from torch import nn
from transformers.models.idefics3 import modeling_idefics3 as idefics3
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.mistral3 import modeling_mistral3 as mistral3

import vlm_fast
from tests.support.randomised_modules import assert_close, gradients, randomised
from vlm_fast.modules import PixelShuffleConnector, PixelShuffleMLP, RaggedMergerProjector


def config(**parts):
    return types.SimpleNamespace(**parts)


def test_connector_matches_idefics3():
    text, vision = config(hidden_size=16), config(hidden_size=12)
    theirs = idefics3.Idefics3Connector(
        config(scale_factor=3, vision_config=vision, text_config=text)
    )
    ours = PixelShuffleConnector(12, 16, factor=3)
    ours.load_state_dict(randomised(theirs).state_dict())
    x = torch.randn(2, 36, 12)
    with vlm_fast.strict():
        assert_close(gradients(ours, x), gradients(theirs, x))
        assert ours(torch.randn(1, 18, 12), height=3, width=6).shape == (1, 2, 16)
    with pytest.raises(ValueError, match="height is 4, expected a multiple of the factor 3"):
        ours(torch.randn(1, 16, 12))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_mlp_matches_llama4(dropout):
    theirs = llama4.Llama4VisionPixelShuffleMLP(
        config(
            pixel_shuffle_ratio=0.5, projector_input_dim=20, projector_output_dim=20,
            projector_dropout=dropout, hidden_size=12, intermediate_size=48,
        )
    )  # fmt: skip
    ours = PixelShuffleMLP(12, 20, dropout=dropout)
    ours.load_state_dict(randomised(theirs).state_dict())
    x, found = torch.randn(2, 16, 12), []
    with vlm_fast.strict():
        for module in (ours, theirs):
            torch.manual_seed(3)  # dropout uses the same mask
            found.append(gradients(module, x))
        assert_close(*found)
        assert_close(gradients(ours.eval(), x), gradients(theirs.eval(), x))


@pytest.mark.parametrize("bias", [False, True])
def test_ragged_merger_matches_mistral3(bias):
    theirs = mistral3.Mistral3MultiModalProjector(
        config(
            vision_config=config(hidden_size=12, patch_size=2), spatial_merge_size=2,
            text_config=config(hidden_size=16, rms_norm_eps=1e-5), vision_feature_layer=-1,
            multimodal_projector_bias=bias, projector_hidden_act="gelu",
        )
    )  # fmt: skip
    ours = RaggedMergerProjector(12, 16, bias=bias)
    ours.load_state_dict(randomised(theirs).state_dict())
    grids = [(4, 6), (2, 2), (5, 3)]  # the last image has incomplete blocks at its edges
    x, sizes = torch.randn(24 + 4 + 15, 12), [(2 * h, 2 * w) for h, w in grids]
    with vlm_fast.strict():
        assert_close(gradients(ours, x, grids), gradients(theirs, x, sizes))
    with pytest.raises(ValueError, match=r"x is .*, expected \(43, features\)"):
        ours(x[1:], grids)


def test_hooked_linear_is_called():
    ours = randomised(RaggedMergerProjector(12, 16))
    x, calls = torch.randn(24, 12), []
    expected = ours(x, [(4, 6)])
    ours.linear_1.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(vlm_fast.VlmFastFallbackWarning, match="linear_1: it has"):
        torch.testing.assert_close(ours(x, [(4, 6)]), expected)
    assert calls and isinstance(ours.linear_1, nn.Linear)
