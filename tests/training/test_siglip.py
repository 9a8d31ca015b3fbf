"""SigLIP's loss in one process, against a plain reference and transformers.

Tests over several ranks are in `test_losses_distributed.py`.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import SiglipConfig, SiglipModel

from tests.support import reference_losses
from tests.support.dispatch_modes import LargestResult
from tests.support.reference_losses import assert_matches_reference
from vlm_fast.training import losses
from vlm_fast.training.losses.cross_entropy import LOGITS_AT_ONCE

START = (10.0, -10.0)  # of SigLIP's scale and bias


def features(batch, width=8, dtype=torch.float32):
    return [F.normalize(torch.randn(batch, width), dim=-1).to(dtype) for _ in range(2)]


def plain(*inputs):
    return reference_losses.siglip_per_image(*inputs).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale, bias", [START, (117.0, -13.0), (1000.0, -10.0)])
@pytest.mark.parametrize("batch, logits", [(1, 100), (7, 100), (7, 14), (7, 1)])
def test_siglip_loss_matches_reference(monkeypatch, batch, logits, scale, bias, dtype):
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", logits)
    numbers = torch.tensor(scale), torch.tensor(bias)
    assert_matches_reference(losses.siglip_loss, plain, [*features(batch), *numbers], dtype)


def test_siglip_loss_matches_transformers():
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = SiglipConfig(
        text_config=dict(small, vocab_size=9, projection_size=8),
        vision_config=dict(small, image_size=4, patch_size=4),
    )
    model = SiglipModel(config).eval()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10.0))
        model.logit_bias.fill_(-10.0)
        ids, pixels = torch.randint(9, (5, 6)), torch.randn(5, 3, 4, 4)
        theirs = model(input_ids=ids, pixel_values=pixels, return_loss=True)
        scale, bias = model.logit_scale.exp(), model.logit_bias
        assert scale.shape == bias.shape == (1,)
        ours = losses.siglip_loss(theirs.image_embeds, theirs.text_embeds, scale, bias)
    torch.testing.assert_close(ours, theirs.loss)


def test_scale_and_bias_gradients_keep_their_shape():
    numbers = [torch.full((1,), x, requires_grad=True) for x in START]
    both = [*features(5), *numbers]
    found = torch.autograd.grad(losses.siglip_loss(*both), numbers)
    for ours, exact in zip(found, torch.autograd.grad(plain(*both), numbers), strict=True):
        torch.testing.assert_close(ours, exact)


def test_siglip_loss_in_low_precision_is_computed_in_fp32():
    inputs = [x.requires_grad_() for x in features(6, dtype=torch.bfloat16)]
    inputs += [torch.tensor(x, dtype=torch.bfloat16, requires_grad=True) for x in (100.0, -10.0)]
    for autocast in (False, True):
        # Backward also runs under autocast.
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = losses.siglip_loss(*inputs)
            gradients = torch.autograd.grad(found, inputs)
        exact = plain(*(x.double() for x in inputs))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact.float())
        for gradient, wanted in zip(gradients, torch.autograd.grad(exact, inputs), strict=True):
            # Each is rounded once: at most half an ulp apart, and an ulp at rounding boundaries.
            torch.testing.assert_close(gradient, wanted, rtol=2**-7, atol=0)
            assert gradient.dtype == torch.bfloat16


def test_autocast_does_not_change_the_fp32_loss():
    images, texts = features(6)
    wide = losses.siglip_loss(images, texts, *START)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.siglip_loss(images, texts, *START), wide)


def test_float_scale_and_bias_are_not_rounded_to_fp32():
    images, texts = features(3, dtype=torch.float64)
    found = losses.siglip_loss(images, texts, 10.1, -0.1)
    torch.testing.assert_close(found, plain(images, texts, 10.1, -0.1), rtol=1e-14, atol=0)


def test_frozen_image_features_get_no_gradient():
    images, texts = features(4)
    texts.requires_grad_()
    losses.siglip_loss(images, texts, *START).backward()
    assert images.grad is None
    assert texts.grad.ne(0).all()


def test_siglip_double_backward_raises():
    images, texts = (x.requires_grad_() for x in features(4))
    loss = losses.siglip_loss(images, texts, *START)
    with pytest.raises(RuntimeError, match="siglip_loss: double backward"):
        torch.autograd.grad(loss, images, create_graph=True)


def test_siglip_loss_never_allocates_all_logits(monkeypatch):
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", 64)
    images, texts = (x.requires_grad_() for x in features(32, width=2))
    with LargestResult() as ours:
        losses.siglip_loss(images, texts, *START).backward()
    with LargestResult() as theirs:
        plain(images, texts, *START).backward()
    assert (ours.numbers, theirs.numbers) == (64, 32 * 32)


@pytest.mark.parametrize(
    "change, exception, words",
    [
        (dict(image_features="x"), TypeError, "image_features str"),
        (dict(image_features=torch.ones(3, 5, 8)), ValueError, "image_features (3, 5, 8)"),
        (dict(image_features=torch.ones(3, 8, dtype=torch.int64)), TypeError, "int64 floating"),
        (dict(image_features=torch.ones(0, 8), text_features=torch.ones(0, 8)), ValueError,
         "image_features one row"),
        (dict(text_features=torch.ones(2, 8)), ValueError, "text_features (3, 8)"),
        (dict(text_features=torch.ones(3, 8).bfloat16()), TypeError, "text_features bfloat16"),
        (dict(text_features=torch.ones(3, 8, device="meta")), ValueError, "text_features cpu"),
        (dict(scale=0.0), ValueError, "scale 0.0 positive"),
        (dict(scale=torch.tensor(math.inf)), ValueError, "scale inf positive"),
        (dict(scale=torch.ones(2)), ValueError, "scale (2,) one element"),
        (dict(bias=torch.ones(0)), ValueError, "bias (0,) one element"),
        (dict(bias=math.nan), ValueError, "bias nan finite"),
        (dict(bias=-math.inf), ValueError, "bias inf finite"),
        (dict(bias=torch.tensor(1)), ValueError, "bias int64 floating"),
    ],
)  # fmt: skip
def test_siglip_loss_invalid_arguments_raise(change, exception, words):
    images, texts = features(3)
    arguments = dict(image_features=images, text_features=texts, scale=10.0, bias=-10.0) | change
    with pytest.raises(exception, match=r"^vlm_fast.siglip_loss: .*expected") as error:
        losses.siglip_loss(**arguments)
    assert all(word in str(error.value) for word in words.split())
