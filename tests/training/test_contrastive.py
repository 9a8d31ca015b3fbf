"""ITC loss, hard negatives and ITM loss in one process, against plain references."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support import reference_losses
from tests.support.reference_losses import assert_matches_reference
from vlm_fast.training import losses


def features(batch, queries=5, width=8, dtype=torch.float32):
    images, texts = torch.randn(batch, queries, width), torch.randn(batch, width)
    return [F.normalize(x, dim=-1).to(dtype).requires_grad_() for x in (images, texts)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("local_loss", [True, False])
@pytest.mark.parametrize("batch", [1, 6])
def test_itc_loss_matches_reference(batch, local_loss, smoothing):
    def ours(images, texts, temperature):
        return losses.itc_loss(
            images, texts, temperature, label_smoothing=smoothing, local_loss=local_loss
        ).loss

    def plain(images, texts, temperature):
        return reference_losses.itc(images, texts, temperature, smoothing)[0]

    assert_matches_reference(ours, plain, [*features(batch), torch.tensor(0.07)], torch.float32)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
@pytest.mark.parametrize("local_loss", [True, False])
def test_temperature_of_one_element_broadcasts(shape, local_loss):
    images, texts = features(4)
    temperature = torch.full(shape, 0.07, requires_grad=True)
    found = losses.itc_loss(images, texts, temperature, local_loss=local_loss)
    expected, logits = reference_losses.itc(images, texts, temperature)
    assert found.loss.shape == () and found.similarity_i2t.shape == logits.shape
    torch.testing.assert_close(found.loss, expected)
    ours, plain = (torch.autograd.grad(x, temperature)[0] for x in (found.loss, expected))
    torch.testing.assert_close(ours, plain)


def test_itc_loss_returns_logits_of_both_directions():
    images, texts = features(6)
    _, i2t, t2i = losses.itc_loss(images, texts, 0.5)
    logits = reference_losses.itc(images, texts, 0.5)[1]
    torch.testing.assert_close(i2t, logits)
    torch.testing.assert_close(t2i, logits.t())


def test_itc_loss_in_low_precision_sums_in_fp32():
    images, texts = features(6, dtype=torch.bfloat16)
    found = losses.itc_loss(images, texts, 0.07)
    assert {x.dtype for x in found} == {torch.float32}
    gradients = torch.autograd.grad(found.loss, [images, texts])
    assert {g.dtype for g in gradients} == {torch.bfloat16}


@pytest.mark.parametrize(
    "change, exception, words",
    [
        (dict(image_features="x"), TypeError, "image_features"),
        (dict(image_features=torch.ones(3, 4)), ValueError, "image_features (3, 4)"),
        (dict(image_features=torch.ones(3, 5, 8, dtype=torch.int64)), TypeError, "int64"),
        (dict(image_features=torch.ones(0, 5, 8), text_features=torch.ones(0, 8)), ValueError,
         "image_features one row"),
        (dict(text_features=torch.ones(2, 8)), ValueError, "text_features (3, 8)"),
        (dict(text_features=torch.ones(3, 8).bfloat16()), TypeError, "text_features bfloat16"),
        (dict(text_features=torch.ones(3, 8, device="meta")), ValueError, "text_features cpu"),
        (dict(temperature=0.0), ValueError, "temperature positive"),
        (dict(temperature=math.nan), ValueError, "temperature nan"),
        (dict(temperature=torch.tensor(-1.0)), ValueError, "temperature positive"),
        (dict(temperature=torch.ones(2)), ValueError, "temperature (2,) one element"),
        (dict(temperature=torch.ones(0)), ValueError, "temperature (0,) one element"),
        (dict(temperature=torch.ones(1, dtype=torch.int64)), ValueError, "temperature int64"),
        (dict(temperature=torch.zeros(1)), ValueError, "temperature positive"),
        (dict(label_smoothing=1.5), ValueError, "label_smoothing 1.5"),
    ],
)  # fmt: skip
def test_itc_loss_invalid_arguments_raise(change, exception, words):
    images, texts = features(3)
    arguments = dict(image_features=images, text_features=texts, temperature=0.1) | change
    with pytest.raises(exception, match=r"^vlm_fast.itc_loss: .*expected") as error:
        losses.itc_loss(**arguments)
    assert all(word in str(error.value) for word in words.split())


def test_hard_negatives_are_drawn_by_similarity():
    draws, offset = 4000, 2
    similarity = torch.randn(3, 6) * 1.5
    similarity.diagonal(offset).fill_(50.0)  # the positive pair is never drawn
    counts = torch.zeros(3, 6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        drawn = losses.hard_negatives(similarity, offset, generator)
        counts[torch.arange(3), drawn] += 1
    expected = similarity.clone()
    expected.diagonal(offset).fill_(-math.inf)
    expected = draws * expected.softmax(1)
    assert counts.diagonal(offset).eq(0).all()
    others = expected > 0
    chi_square = ((counts - expected).square()[others] / expected[others]).sum()
    assert chi_square < 27.7  # 12 degrees of freedom: 1 in 160 by chance, and the seed is fixed


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_hard_negatives_are_uniform_without_likely_partner(offset):
    similarity = torch.full((3, 8), -math.inf)
    similarity[1] = 3.0  # among ordinary rows
    similarity[2, [offset + 2, 7]] = torch.tensor([2.0, -1e30])
    before = similarity.clone()
    counts = torch.zeros(3, 8)
    for _ in range(600):
        counts[torch.arange(3), losses.hard_negatives(similarity, offset)] += 1
    assert torch.equal(similarity, before)
    assert counts.diagonal(offset).eq(0).all()
    assert counts[0].count_nonzero() == 7 and counts[0].max() < 3 * 600 / 7
    assert counts[2, 7] == (600 if offset < 5 and offset + 2 != 7 else 0)


def test_single_negative_is_drawn_despite_zero_probability():
    for dtype in (torch.float32, torch.float16):
        similarity = torch.tensor([[5.0, -math.inf], [-math.inf, -math.inf]]).to(dtype)
        assert losses.hard_negatives(similarity, 0).tolist() == [1, 0]


def test_hard_negatives_are_reproducible_by_generator():
    similarity = torch.randn(50, 50)
    first, again = (
        losses.hard_negatives(similarity, 0, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, losses.hard_negatives(similarity, 0))


@pytest.mark.parametrize(
    "similarity, offset, exception, words",
    [
        (torch.zeros(1, 1), 0, ValueError, "similarity 2 columns"),
        (torch.zeros(3), 0, ValueError, "similarity (3,)"),
        (torch.zeros(2, 4), 3, ValueError, "rank_offset 3"),
        (torch.zeros(2, 4), -1, ValueError, "rank_offset -1"),
        (torch.zeros(2, 4, dtype=torch.int64), 0, TypeError, "similarity int64"),
        ([[0.0, 1.0]], 0, TypeError, "similarity list"),
    ],
)
def test_hard_negatives_invalid_arguments_raise(similarity, offset, exception, words):
    with pytest.raises(exception, match=r"^vlm_fast.hard_negatives: .*expected") as error:
        losses.hard_negatives(similarity, offset)
    assert all(word in str(error.value) for word in words.split())


def test_exchange_rows_without_process_group():
    tensor, rows = torch.randn(4, 3, requires_grad=True), torch.tensor([2, 0, 2])
    found = losses.exchange_rows(tensor, rows)
    assert torch.equal(found, tensor[rows])
    (gradient,) = torch.autograd.grad(found.sum(), tensor)
    assert gradient.sum(1).tolist() == [3.0, 0.0, 6.0, 0.0]


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)],
)
def test_exchange_rows_invalid_arguments_raise(rows):
    with pytest.raises(ValueError, match=r"^vlm_fast.exchange_rows: rows .*expected"):
        losses.exchange_rows(torch.zeros(4, 3), rows)


def test_itm_loss_matches_reference():
    labels = torch.tensor([1, 1, 0, 0, 0, 0])

    def plain(logits):
        return F.cross_entropy(logits.mean(1), labels)

    assert_matches_reference(losses.itm_loss, plain, [torch.randn(6, 5, 2)], torch.float32)
    other = labels.flip(0)
    logits = torch.randn(6, 5, 2)
    expected = F.cross_entropy(logits.mean(1), other)
    torch.testing.assert_close(losses.itm_loss(logits, other), expected)
    torch.testing.assert_close(losses.itm_loss(logits[:4], other[:4]),
                               F.cross_entropy(logits[:4].mean(1), other[:4]))  # fmt: skip


@pytest.mark.parametrize(
    "logits, labels",
    [
        (torch.zeros(4, 5, 2), None),
        (torch.zeros(6, 5, 3), None),
        (torch.zeros(6, 2), None),
        (torch.zeros(0, 5, 2), None),
        (torch.zeros(6, 5, 2), torch.zeros(5, dtype=torch.int64)),
        (torch.zeros(6, 5, 2), torch.zeros(6)),
    ],
)
def test_itm_loss_invalid_arguments_raise(logits, labels):
    with pytest.raises(ValueError, match=r"^vlm_fast.itm_loss: .*expected"):
        losses.itm_loss(logits, labels)
