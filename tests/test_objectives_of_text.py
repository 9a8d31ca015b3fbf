"""The loss over a vocabulary and its head, against the same written plainly."""

import pytest
import torch
from torch import nn

from tests import plain_blip2
from tests.cases import DTYPES, assert_right
from tests.plain_blip2 import judged
from tests.test_saved_bytes import peak_bytes
from vlm_fast import objectives
from vlm_fast.objectives import language


def text(batch=3, tokens=7, hidden=8, vocabulary=50):
    labels = torch.randint(vocabulary, (batch, tokens))
    labels[1, 4:] = -100
    weight, bias = torch.randn(vocabulary, hidden) * hidden**-0.5, torch.randn(vocabulary)
    return torch.randn(batch, tokens, hidden), weight, labels, bias


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows_at_a_time", [1, 4, 1000])
def test_generation(monkeypatch, dtype, smoothing, with_bias, rows_at_a_time):
    monkeypatch.setitem(language.LOGITS, "cpu", 50 * rows_at_a_time)
    hidden, weight, labels, bias = text()

    def of(function, **options):
        return lambda hidden, weight, bias=None: function(hidden, weight, labels, bias, **options)

    tensors = [t.to(dtype) for t in ([hidden, weight, bias] if with_bias else [hidden, weight])]
    ours = of(objectives.itg_loss, label_smoothing=smoothing)
    judged(ours, of(plain_blip2.itg, smoothing=smoothing), tensors, dtype)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_generation_gives_the_gradients_that_are_wanted(wanted):
    hidden, weight, labels, bias = text()
    tensors = [hidden, weight, bias]
    for i in wanted:
        tensors[i].requires_grad_()
    found = objectives.itg_loss(hidden, weight, labels, bias, label_smoothing=0.1)
    expected = plain_blip2.itg(hidden, weight, labels, bias, smoothing=0.1)
    inputs = [tensors[i] for i in wanted]
    pairs = zip(torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs),
                strict=True)  # fmt: skip
    for ours, plain in pairs:
        torch.testing.assert_close(ours, plain)


def test_generation_on_what_pads_everything_is_nan_as_in_pytorch():
    hidden, weight, labels, _ = text()
    hidden.requires_grad_()
    loss = objectives.itg_loss(hidden, weight, torch.full_like(labels, -100))
    assert loss.isnan()
    assert plain_blip2.itg(hidden, weight, torch.full_like(labels, -100)).isnan()


def test_generation_ignores_another_label():
    hidden, weight, labels, _ = text()
    labels[labels == -100] = 0
    torch.testing.assert_close(
        objectives.itg_loss(hidden, weight, labels, ignore_index=0),
        plain_blip2.itg(hidden, weight, labels, ignore_index=0),
    )


def test_generation_under_autocast():
    hidden, weight, labels, bias = text()
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]

    def run(function, change=lambda t: t):
        loss = function(*map(change, inputs[:2]), labels, change(bias))
        gradients = torch.autograd.grad(loss, inputs)
        assert [g.dtype for g in gradients] == [torch.float32] * 3
        return {"loss": loss.detach()} | {str(i): g for i, g in enumerate(gradients)}

    def within(function):
        with torch.autocast("cpu", torch.bfloat16):
            found = run(function)
        return {n: t if n == "loss" else t.bfloat16() for n, t in found.items()}

    exact = run(plain_blip2.itg, lambda t: t.bfloat16().double())
    assert_right(within(objectives.itg_loss), lambda: within(plain_blip2.itg), exact, "loss")


def test_generation_has_no_tensor_of_all_logits(monkeypatch):
    monkeypatch.setitem(language.LOGITS, "cpu", 16 * 4000)
    hidden, weight, labels, bias = text(batch=8, tokens=65, hidden=16, vocabulary=4000)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]

    def step(loss):
        return lambda: torch.autograd.grad(loss(hidden, weight, labels, bias), inputs)

    logits = 4 * 8 * 64 * 4000
    assert peak_bytes(step(objectives.itg_loss))[0] < logits / 4
    assert peak_bytes(step(plain_blip2.itg))[0] > 2 * logits


@pytest.mark.parametrize(
    "change, exception, words",
    [
        (dict(hidden=torch.zeros(3, 8)), ValueError, "hidden (3, 8)"),
        (dict(hidden=torch.zeros(3, 1, 8)), ValueError, "hidden 2 tokens"),
        (dict(weight=torch.zeros(50, 9)), ValueError, "weight (50, 9)"),
        (dict(weight=torch.zeros(50, 8).double()), TypeError, "weight float64"),
        (dict(labels=torch.zeros(3, 6, dtype=torch.int64)), ValueError, "labels (3, 6)"),
        (dict(labels=torch.zeros(3, 7)), TypeError, "labels int64"),
        (dict(bias=torch.zeros(8)), ValueError, "bias (50,)"),
        (dict(label_smoothing=-0.1), ValueError, "label_smoothing"),
        (dict(weight=None), TypeError, "weight NoneType"),
    ],
)
def test_mistakes_of_generation(change, exception, words):
    arguments = dict(zip(("hidden", "weight", "labels", "bias"), text(), strict=True)) | change
    with pytest.raises(exception, match=r"^vlm_fast.itg_loss: .*expected") as error:
        objectives.itg_loss(**arguments)
    assert all(word in str(error.value) for word in words.split())


def test_the_head_is_berts():
    transformers = pytest.importorskip("transformers")
    from transformers.models.bert.modeling_bert import BertLMPredictionHead

    config = transformers.BertConfig(hidden_size=8, vocab_size=50)
    theirs = BertLMPredictionHead(config)
    embeddings = nn.Embedding(50, 8)
    head = objectives.LanguageModelHead(embeddings)
    assert head.decoder.weight is embeddings.weight
    names = head.state_dict().keys()
    assert names == theirs.state_dict().keys() - {"bias"}  # another name of the decoder's
    torch.nn.init.normal_(theirs.decoder.bias)
    head.load_state_dict({n: v for n, v in theirs.state_dict().items() if n in names})
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(head(x), theirs(x))
