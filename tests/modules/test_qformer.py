"""The Q-Former matches transformers' by the tolerance rule, patched and as our module."""

import copy

import pytest
import torch
from torch import nn

import vlm_fast
from tests.support import small_connectors
from tests.support.cases import assert_right
from tests.support.tiny_qformers import (
    SMALL,
    blip2,
    images,
    instructblip,
    ones_but,
    outputs_and_gradients,
)
from vlm_fast.modules import QFormer

DTYPES = [torch.float32, torch.bfloat16]


class WithLength(nn.Module):
    """A Q-Former that passes the number of query tokens on."""

    def __init__(self, qformer):
        super().__init__()
        self.qformer = qformer

    def forward(self, **given):
        return self.qformer(query_length=5, **given)


def assert_same(model, inputs, dtype):
    """Check output and gradients by the tolerance rule; the reference is the model in float64."""
    # Rounded once, so that all three models get the same inputs.
    model = copy.deepcopy(model).to(dtype).float()
    inputs = {n: v.to(dtype).float() if v.is_floating_point() else v for n, v in inputs.items()}
    fast = copy.deepcopy(model)
    vlm_fast.patch(fast)
    with vlm_fast.strict():
        ours = outputs_and_gradients(fast, inputs, dtype)
    exact = outputs_and_gradients(model, inputs, torch.float64)
    for name in [name for name, gradient in exact.items() if gradient is None]:
        gradient = ours.pop(name)
        assert gradient is None or not gradient.any(), name
    assert len(ours) > 20
    assert_right(ours, lambda: outputs_and_gradients(model, inputs, dtype), exact, "output")


FULL = dict(num_hidden_layers=12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "implementation, dtype", [("eager", torch.float32), ("sdpa", torch.bfloat16)], ids=str
)
def test_full_size_blip2_matches_transformers(implementation, dtype):
    inputs = dict(
        query_embeds=torch.randn(1, 32, 768),
        encoder_hidden_states=images(1, 257, 1408),
        encoder_attention_mask=ones_but(1, 257),
    )
    assert_same(blip2(implementation, **FULL), inputs, dtype)


@pytest.mark.slow
def test_full_size_instructblip_matches_transformers():
    inputs = dict(
        input_ids=torch.randint(5, 99, (1, 8)),
        attention_mask=ones_but(1, 40, (0, 9)),
        query_embeds=torch.randn(1, 32, 768),
        encoder_hidden_states=images(1, 257, 1408),
        encoder_attention_mask=ones_but(1, 257, (0, 30)),
    )
    assert_same(instructblip(**FULL), inputs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_instructblip_matches_transformers(implementation, dtype):
    inputs = dict(
        input_ids=torch.randint(5, 99, (2, 7)),
        attention_mask=ones_but(2, 12, (1, 3)),
        query_embeds=torch.randn(2, 5, 48),
        encoder_hidden_states=images(2, 17, 40),
        encoder_attention_mask=ones_but(2, 17, (0, 6)),
    )
    assert_same(instructblip(implementation, **SMALL), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "batch, hidden", [(2, []), (3, [(1, 5), (2, 16)]), (1, [])], ids=["", "padded", "one"]
)
def test_blip2_matches_transformers(implementation, dtype, batch, hidden):
    inputs = dict(
        query_embeds=torch.randn(batch, 5, 48),
        encoder_hidden_states=images(batch, 17, 40),
        encoder_attention_mask=ones_but(batch, 17, *hidden),
    )
    assert_same(blip2(implementation, **SMALL), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", [0, 7])
@pytest.mark.parametrize("keys", [17, 3])
def test_blip2_with_text_matches_transformers(dtype, text, keys):
    inputs = dict(
        query_embeds=torch.randn(2, 5 + text, 48),
        encoder_hidden_states=images(2, keys, 40),
        attention_mask=ones_but(2, 5 + text, (1, min(text, 3))),
    )
    assert_same(WithLength(blip2(text=True, **SMALL)), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_query_batch_for_many_windows(dtype):
    """As in Granite speech: three queries and a window of fifteen frames."""
    inputs = dict(query_embeds=torch.randn(1, 3, 48), encoder_hidden_states=images(4, 15, 40))
    assert_same(blip2(**SMALL), inputs, dtype)


@pytest.mark.parametrize("expanded", [True, False])
def test_expanded_queries_are_projected_once(expanded, monkeypatch):
    model = blip2(**SMALL)
    vlm_fast.patch(model)
    query = torch.randn(1, 5, 48, requires_grad=True)
    given = query.expand(4, -1, -1) if expanded else query.repeat(4, 1, 1)
    image = images(4, 17, 40)
    seen, norm = [], torch.nn.functional.layer_norm
    monkeypatch.setattr(
        torch.nn.functional,
        "layer_norm",
        lambda x, *a, **k: seen.append(x.shape[0]) or norm(x, *a, **k),
    )
    out = model(query_embeds=given, encoder_hidden_states=image).last_hidden_state
    assert seen[0] == (1 if expanded else 4)
    vlm_fast.unpatch(model)
    expected = model(query_embeds=given, encoder_hidden_states=image).last_hidden_state
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(out.square().sum(), query)[0]
    torch.testing.assert_close(
        found, torch.autograd.grad(expected.square().sum(), query)[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("count", [2, 4])
def test_expanded_queries_keep_batch_size(count):
    """With one or two sequences per image the output has the batch size of the queries."""
    model = blip2(**SMALL)
    query, image = torch.randn(1, 5, 48).expand(4, -1, -1), images(count, 17, 40)
    qformer = QFormer.from_module(model)
    found = qformer(query, None, None, image).last_hidden_state
    expected = qformer(
        query.contiguous(), None, None, image.repeat_interleave(4 // count, 0)
    ).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_expanded_queries_without_images():
    model = blip2(**SMALL, cross_attention_frequency=100)
    for layer in model.encoder.layer:
        vars(layer)["_modules"].pop("crossattention", None)
    out = QFormer.from_module(model)(torch.randn(1, 5, 48).expand(3, -1, -1)).last_hidden_state
    assert out.shape == (3, 5, 48)


@pytest.mark.parametrize("part", ["attention", "crossattention", "output_query"])
def test_active_dropout_in_any_layer_is_applied(part):
    model = blip2(**SMALL, hidden_dropout_prob=0.5)
    getattr(model.encoder.layer[0], part).train()
    qformer = QFormer.from_module(model)
    given = (torch.randn(2, 5, 48), None, None, images(2, 17, 40))
    first, second = (qformer(*given).last_hidden_state for _ in range(2))
    assert first.isfinite().all() and not torch.equal(first, second)


# ---- the module ----


def same_weights(model, **options):
    ours = QFormer(**small_connectors.SMALL, **options)
    ours.load_state_dict(model.state_dict())
    return ours.eval()


def test_module_has_checkpoint_keys():
    full = blip2(num_hidden_layers=2, text=True).state_dict()
    ours = QFormer(num_hidden_layers=2, use_qformer_text_input=True).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in full.items()}


def test_module_matches_transformers():
    model = blip2(text=True, **SMALL)
    ours, shared = same_weights(model, use_qformer_text_input=True), QFormer.from_module(model)
    query, image = torch.randn(3, 9, 48), images(3, 17, 40)
    mask = ones_but(3, 9, (1, 2))
    expected = model(query, 5, mask, image, ones_but(3, 17))
    for qformer in (ours, shared):
        with vlm_fast.strict():
            out = qformer(query, 5, mask, image, ones_but(3, 17))
        torch.testing.assert_close(
            out.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(out.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
        assert out.past is None
    assert shared.encoder is model.encoder


def test_shared_keys_and_several_sequences_per_image():
    qformer = QFormer.from_module(blip2(text=True, **SMALL))
    image = images(3, 17, 40)
    sequences = torch.randn(3, 2, 9, 48)  # two texts an image
    projected = qformer.image_key_values(image)
    assert [tuple(layer.shape) for layer in projected.layers] == [(3, 17, 96)] * 2
    together = qformer(sequences.flatten(0, 1), 5, None, image).last_hidden_state
    shared = qformer(sequences.flatten(0, 1), 5, image_key_values=projected).last_hidden_state
    one = [
        qformer(sequences[i, g][None], 5, None, image[i][None]).last_hidden_state[0]
        for i in range(3)
        for g in range(2)
    ]
    for found in (together, shared):
        torch.testing.assert_close(found, torch.stack(one), rtol=1e-5, atol=1e-5)
    some = projected.select(torch.tensor([2, 0]))
    torch.testing.assert_close(
        qformer(sequences[[2, 0], 1], 5, image_key_values=some).last_hidden_state,
        torch.stack([one[5], one[1]]), rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_two_pass_generation_equals_multimodal_causal_mask():
    """Queries attend to queries, and text to queries and earlier text: two passes equal one."""
    qformer = QFormer.from_module(blip2(text=True, **SMALL))
    query, text, image = torch.randn(2, 5, 48), torch.randn(2, 7, 48), images(2, 17, 40)
    padding = ones_but(2, 7, (1, 2))
    first = qformer(query, encoder_hidden_states=image, keep=True)
    second = qformer(text, 0, padding, past=first.past, causal=True)
    seen = torch.ones(12, 12).tril().bool()
    seen[:5, :5] = True
    seen[:5, 5:] = False
    full = seen & torch.cat([torch.ones(2, 5), padding], 1).bool()[:, None]
    both = qformer(torch.cat([query, text], 1), 5, full, image).last_hidden_state
    torch.testing.assert_close(first.last_hidden_state, both[:, :5], rtol=1e-5, atol=1e-5)
    visible = padding.bool()
    torch.testing.assert_close(
        second.last_hidden_state[visible], both[:, 5:][visible], rtol=1e-5, atol=1e-5
    )


def test_dropout_is_reproducible_by_seed():
    qformer = QFormer.from_module(blip2(**SMALL)).train()
    query, image = torch.randn(2, 5, 48), images(2, 17, 40)

    def run(seed):
        torch.manual_seed(seed)
        qformer.zero_grad()
        out = qformer(query, encoder_hidden_states=image).last_hidden_state
        out.square().sum().backward()
        return out.detach(), [p.grad.clone() for p in qformer.parameters()]

    (first, gradients), (again, same), (other, _) = run(0), run(0), run(1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all(map(torch.equal, gradients, same))
    kept = qformer.eval()(query, encoder_hidden_states=image).last_hidden_state
    assert not torch.equal(kept, first)


def test_compute_dtype_keeps_weight_and_output_dtypes():
    model = blip2(**SMALL)
    query, image = torch.randn(2, 5, 48), images(2, 17, 40)
    exact = model(query_embeds=query, encoder_hidden_states=image).last_hidden_state
    qformer = QFormer.from_module(model, compute_dtype=torch.bfloat16)
    out = qformer(query, encoder_hidden_states=image).last_hidden_state
    assert out.dtype == torch.float32
    assert 1e-4 < (out - exact).abs().max() < 0.1
    out.sum().backward()
    assert {p.grad.dtype for p in qformer.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(query_embeds=torch.randn(2, 5, 47)), "query_embeds"),
        (dict(query_embeds=None), "query_embeds"),
        (dict(query_length=6), "query_length"),
        (dict(query_length=3), "query_length"),
        (dict(attention_mask=torch.ones(2, 6)), "attention_mask"),
        (dict(encoder_hidden_states=None), "encoder_hidden_states"),
        (dict(encoder_hidden_states=torch.randn(2, 17, 41)), "encoder_hidden_states"),
        (dict(encoder_hidden_states=torch.randn(3, 17, 40)), "encoder_hidden_states"),
        (dict(encoder_hidden_states=torch.randn(17, 40)), "encoder_hidden_states"),
        (dict(encoder_attention_mask=torch.ones(2, 16)), "encoder_attention_mask"),
        (dict(past=[]), "past"),
    ],
)
def test_invalid_arguments_raise(change, named):
    qformer = QFormer.from_module(blip2(**SMALL))
    right = dict(query_embeds=torch.randn(2, 5, 48), encoder_hidden_states=images(2, 17, 40))
    qformer(**right)
    with pytest.raises((TypeError, ValueError), match=rf"vlm_fast.QFormer: {named}"):
        qformer(**(right | change))


def test_cuda_graph_needs_a_gpu():
    with pytest.raises(RuntimeError, match="not on a CUDA device"):
        QFormer.from_module(blip2(**SMALL)).capture_graph(torch.randn(2, 5, 48), images(2, 17, 40))
