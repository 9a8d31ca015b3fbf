"""The image-grounded text generation (ITG) loss and its head, against a plain reference."""

import sys
import types

import pytest
import torch
from torch import nn

from tests.support import reference_losses
from tests.support.cases import DTYPES, assert_right
from tests.support.reference_losses import assert_matches_reference
from vlm_fast.devtools.memory import peak_bytes
from vlm_fast.training import losses
from vlm_fast.training.losses import cross_entropy


def text(batch=3, tokens=7, hidden=8, vocabulary=50):
    labels = torch.randint(vocabulary, (batch, tokens))
    labels[1, 4:] = -100
    weight, bias = torch.randn(vocabulary, hidden) * hidden**-0.5, torch.randn(vocabulary)
    return torch.randn(batch, tokens, hidden), weight, labels, bias


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows_at_a_time", [1, 4, 1000])
def test_itg_loss_matches_reference(monkeypatch, dtype, smoothing, with_bias, rows_at_a_time):
    monkeypatch.setitem(cross_entropy.LOGITS_AT_ONCE, "cpu", 50 * rows_at_a_time)
    hidden, weight, labels, bias = text()

    def of(function, **options):
        return lambda hidden, weight, bias=None: function(hidden, weight, labels, bias, **options)

    tensors = [t.to(dtype) for t in ([hidden, weight, bias] if with_bias else [hidden, weight])]
    ours = of(losses.itg_loss, label_smoothing=smoothing)
    assert_matches_reference(ours, of(reference_losses.itg, smoothing=smoothing), tensors, dtype)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_itg_loss_computes_only_wanted_gradients(wanted):
    hidden, weight, labels, bias = text()
    tensors = [hidden, weight, bias]
    for i in wanted:
        tensors[i].requires_grad_()
    found = losses.itg_loss(hidden, weight, labels, bias, label_smoothing=0.1)
    expected = reference_losses.itg(hidden, weight, labels, bias, smoothing=0.1)
    inputs = [tensors[i] for i in wanted]
    pairs = zip(torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs),
                strict=True)  # fmt: skip
    for ours, plain in pairs:
        torch.testing.assert_close(ours, plain)


def test_itg_loss_of_all_ignored_labels_is_nan_as_in_pytorch():
    hidden, weight, labels, _ = text()
    hidden.requires_grad_()
    loss = losses.itg_loss(hidden, weight, torch.full_like(labels, -100))
    assert loss.isnan()
    assert reference_losses.itg(hidden, weight, torch.full_like(labels, -100)).isnan()


def test_itg_loss_with_another_ignore_index():
    hidden, weight, labels, _ = text()
    labels[labels == -100] = 0
    torch.testing.assert_close(
        losses.itg_loss(hidden, weight, labels, ignore_index=0),
        reference_losses.itg(hidden, weight, labels, ignore_index=0),
    )


def test_itg_loss_under_autocast():
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

    exact = run(reference_losses.itg, lambda t: t.bfloat16().double())
    assert_right(within(losses.itg_loss), lambda: within(reference_losses.itg), exact, "loss")


def predictable_text(size=6.0, hidden=64, vocabulary=500):
    """A text whose labels the weight predicts; a larger scale makes it more certain."""
    x, weight = torch.randn(4, 33, hidden), torch.randn(vocabulary, hidden) / 8
    labels = torch.zeros(4, 33, dtype=torch.int64)
    labels[:, 1:] = (x[:, :-1] @ weight.t()).argmax(-1)
    return (size * x).half(), weight.half(), labels, torch.zeros(vocabulary).half()


@pytest.mark.parametrize("scale", [65536.0, 32768.0, 3000.0, 1.0])
@pytest.mark.parametrize("size", [0.1, 6.0, 12.0, 40.0])
def test_fp16_loss_scale_is_applied_before_gradients_are_rounded(scale, size):
    hidden, weight, labels, bias = predictable_text(size)

    def gradients(loss, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        value = loss(inputs[0], inputs[1], labels, inputs[2])
        grads = torch.autograd.grad(value * scale, inputs)
        return dict(zip(("hidden", "weight", "bias"), grads, strict=True))

    found = gradients(losses.itg_loss, torch.float16)
    native = gradients(reference_losses.itg, torch.float16)
    exact = gradients(reference_losses.itg, torch.float64)
    assert_right(found, lambda: gradients(reference_losses.itg, torch.float16), exact)
    for name, true in exact.items():
        ours, theirs = ((g[name] - true).norm() for g in (found, native))
        assert ours <= 1.5 * theirs, name  # rounded twice, unless the scale is a power of two


def test_fp16_sums_over_many_tokens_do_not_overflow():
    """Features of one sign add up over tokens, but mean and gradient are in range."""
    hidden = torch.full((4, 801, 8), 60.0).half()
    weight, labels = torch.zeros(50, 8).half(), torch.zeros(4, 801, dtype=torch.int64)
    inputs = [t.requires_grad_() for t in (hidden, weight)]
    loss = losses.itg_loss(*inputs, labels)
    for scale in (1.0, 512.0):
        for gradient in torch.autograd.grad(loss * scale, inputs, retain_graph=True):
            assert gradient.isfinite().all()
    (found,) = torch.autograd.grad(loss, [weight])
    torch.testing.assert_close(found[0], torch.full((8,), 60.0 * (1 / 50 - 1)).half())


def test_double_backward_raises(monkeypatch):
    hidden, weight, labels, bias = text()
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]

    def refuses():
        loss = losses.itg_loss(*inputs[:2], labels, bias)
        with pytest.raises(RuntimeError, match=r"vlm_fast.itg_loss: double backward is not"):
            torch.autograd.grad(loss, inputs, create_graph=True)
        torch.autograd.grad(loss, inputs)

    refuses()
    # A loss that computes gradients in forward would give constants without an error.
    functional = types.ModuleType("liger_kernel.transformers.functional")

    def loss(rows, weight, targets, bias, **options):
        return nn.functional.cross_entropy(nn.functional.linear(rows, weight, bias), targets)

    functional.liger_fused_linear_cross_entropy = loss
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    monkeypatch.setattr(cross_entropy, "_liger_serves", lambda rows, weight: True)
    refuses()


def test_itg_loss_never_allocates_all_logits(monkeypatch):
    monkeypatch.setitem(cross_entropy.LOGITS_AT_ONCE, "cpu", 16 * 4000)
    hidden, weight, labels, bias = text(batch=8, tokens=65, hidden=16, vocabulary=4000)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]

    def step(loss):
        return lambda: torch.autograd.grad(loss(hidden, weight, labels, bias), inputs)

    logits = 4 * 8 * 64 * 4000
    assert peak_bytes(step(losses.itg_loss), "cpu") < logits / 4
    assert peak_bytes(step(reference_losses.itg), "cpu") > 2 * logits


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
def test_itg_loss_invalid_arguments_raise(change, exception, words):
    arguments = dict(zip(("hidden", "weight", "labels", "bias"), text(), strict=True)) | change
    with pytest.raises(exception, match=r"^vlm_fast.itg_loss: .*expected") as error:
        losses.itg_loss(**arguments)
    assert all(word in str(error.value) for word in words.split())


def test_lm_head_matches_bert():
    transformers = pytest.importorskip("transformers")
    from transformers.models.bert.modeling_bert import BertLMPredictionHead

    config = transformers.BertConfig(hidden_size=8, vocab_size=50)
    theirs = BertLMPredictionHead(config)
    embeddings = nn.Embedding(50, 8)
    head = losses.LanguageModelHead(embeddings)
    assert head.decoder.weight is embeddings.weight
    names = head.state_dict().keys()
    assert names == theirs.state_dict().keys() - {"bias"}  # tied with the decoder's bias
    torch.nn.init.normal_(theirs.decoder.bias)
    head.load_state_dict({n: v for n, v in theirs.state_dict().items() if n in names})
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(head(x), theirs(x))
