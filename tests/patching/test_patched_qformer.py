"""Patched Q-Formers in real models: hooks, adapters, copies, checkpointing, compilation."""

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend

import vlm_fast
from tests.support.tiny_qformers import (
    FAMILIES,
    QFORMER,
    SMALL,
    TEXT,
    VISION,
    blip2,
    images,
    instructblip,
    ones_but,
    whole,
)
from vlm_fast.modules import QFormer

# The first call of a (module, reason) warns; every one is counted.
pytestmark = pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")


def patched(model=None, **options):
    model = blip2(**SMALL) if model is None else model
    vlm_fast.patch(model, **options)
    return model


def run(model, **given):
    torch.manual_seed(3)
    inputs = dict(query_embeds=torch.randn(2, 5, 48), encoder_hidden_states=images(2, 17, 40))
    return model(**inputs, **given)


def assert_same(model, other, **given):
    ours, theirs = (run(m, **given).last_hidden_state for m in (model, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_models_match_unpatched(name):
    model, inputs = whole(name)

    def step():
        model.zero_grad(set_to_none=True)
        out = model(
            **inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] > 97, -100)
        )
        out.loss.backward()
        return {"loss": out.loss.detach(), "logits": out.logits.detach()} | {
            n: p.grad for n, p in model.named_parameters() if p.grad is not None
        }

    before = step()
    report = vlm_fast.patch(model)
    kinds = {what.split(" by ")[1] for what in report.patched.values()}
    assert kinds >= {"FusedQFormerModel", "FusedQFormerEncoder", "FusedQFormerLayer"}
    vlm_fast.stats(reset=True)
    with vlm_fast.strict():
        after = step()
    assert vlm_fast.stats()["qformer_layer"]["fast"] == 2
    assert before.keys() == after.keys()
    for key, expected in before.items():
        close = 1e-5 * expected.abs().max().item() + 1e-9  # exact gradients of key biases are 0
        torch.testing.assert_close(after[key], expected, rtol=1e-4, atol=close)


def test_granite_speech_projector_matches_unpatched():
    from transformers.models.granite_speech.modeling_granite_speech import (
        GraniteSpeechEncoderProjector,
    )

    qformer = {k: v for k, v in QFORMER.items() if k != "vocab_size"}
    config = transformers.GraniteSpeechConfig(
        projector_config=dict(model_type="blip_2_qformer", **qformer),
        window_size=15, downsample_rate=5,
    )  # fmt: skip
    torch.manual_seed(0)
    projector = GraniteSpeechEncoderProjector(config).eval()
    sound = torch.randn(2, 40, 40)  # three windows of fifteen frames, the last one padded
    expected = projector(sound)
    patched(projector)
    with vlm_fast.strict():
        torch.testing.assert_close(projector(sound), expected, rtol=1e-5, atol=1e-5)


def test_hidden_states_are_returned_and_attentions_fall_back():
    plain, fast = blip2("eager", **SMALL), patched(blip2("eager", **SMALL))
    for _ in range(2):  # transformers does not remove its hooks
        with vlm_fast.strict():
            ours = run(fast, output_hidden_states=True).hidden_states
        for mine, theirs in zip(
            ours, run(plain, output_hidden_states=True).hidden_states, strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        with pytest.raises(vlm_fast.VlmFastFallbackError, match="maps"), vlm_fast.strict():
            run(fast, output_attentions=True)
        ours = run(fast, output_attentions=True)
        theirs = run(plain, output_attentions=True)
        for kind in ("attentions", "cross_attentions"):
            assert len(ours[kind]) == len(theirs[kind]) > 0
            for mine, other in zip(ours[kind], theirs[kind], strict=True):
                torch.testing.assert_close(mine, other)


def test_only_the_layer_with_a_hook_falls_back():
    fast = patched()
    fast.encoder.layer[1].attention.output.register_forward_hook(lambda module, args, out: None)
    vlm_fast.stats(reset=True)
    run(fast)
    assert vlm_fast.stats()["qformer_layer"]["fast"] == 2  # of three layers


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    fast, plain = patched(), blip2(**SMALL)
    found = []
    for model in (fast, plain):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        torch.manual_seed(3)
        image = images(2, 17, 40).requires_grad_()
        query = torch.randn(2, 5, 48, requires_grad=True)
        out = model(query_embeds=query, encoder_hidden_states=image).last_hidden_state
        out.square().sum().backward()
        found.append([image.grad, query.grad, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_dropout_is_identical_when_checkpoint_recomputes():
    model = patched().train()

    def gradients(checkpointed):
        model.zero_grad()
        (model.gradient_checkpointing_enable if checkpointed
         else model.gradient_checkpointing_disable)()  # fmt: skip
        run(model).last_hidden_state.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_hidden_states_have_the_full_batch_size():
    """If hidden states or hooks see tensors before cross-attention, queries are not shared."""
    plain, fast = blip2(**SMALL), patched()
    query = torch.randn(1, 4, 48).expand(3, -1, -1)
    given = dict(query_embeds=query, encoder_hidden_states=images(3, 7, 40))
    for _ in range(2):  # transformers does not remove its hooks
        found = [m(**given, output_hidden_states=True).hidden_states for m in (fast, plain)]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for name in ("layernorm", "dropout", "encoder", "encoder.layer.0"):
        shapes = []
        for model in (fast, plain):
            hook = model.get_submodule(name).register_forward_hook(
                lambda module, args, out: shapes.append(args[0].shape)  # noqa: B023
            )
            model(**given)
            hook.remove()
        assert shapes[0] == shapes[1], name


def test_checkpointing_of_shared_layers_is_unchanged():
    model = blip2(**SMALL).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    query, image = torch.randn(2, 5, 48), images(2, 17, 40).requires_grad_()
    qformer = QFormer.from_module(model)

    def step():
        model.zero_grad()
        image.grad = None
        out = qformer(query, encoder_hidden_states=image, keep=True)
        (out.last_hidden_state.sum() + sum(k.square().sum() for k, _ in out.past)).backward()
        return [image.grad, *(p.grad for p in model.parameters())]

    expected = step()
    calls = []
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        for layer in model.encoder.layer:
            checkpointed = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = lambda *a, f=checkpointed: calls.append(1) or f(*a)
        for one, other in zip(step(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert len(calls) == 3 * (1 + reentrant)


@pytest.mark.parametrize("implementation", ["mine", "sdpa", "eager"])
def test_custom_attention_is_called(implementation, monkeypatch):
    """One registered attention function, and one that replaces transformers' own."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.blip_2 import modeling_blip_2

    def mine(module, query, key, value, mask, **options):
        options["scaling"] = 2 * module.scaling
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    plain, fast = blip2(**SMALL), patched()
    run(fast)
    if implementation == "eager":
        monkeypatch.setattr(modeling_blip_2, "eager_attention_forward", mine)
    else:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, implementation, mine)
    for model in (plain, fast):
        model.set_attn_implementation(implementation)
    assert_same(fast, plain)
    assert any("attention" in reason for reason in vlm_fast.explain(fast).values())


def test_compiles_to_one_graph():
    fast, plain = patched(), blip2(**SMALL)
    graphs = CompileCounterWithBackend("aot_eager")
    assert_same(torch.compile(fast, fullgraph=True, backend=graphs), plain)
    assert graphs.frame_count == 1


def test_fp16_loading_keeps_qformer_in_fp32_by_default(tmp_path):
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config=QFORMER, text_config=TEXT, num_query_tokens=5
    )
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(tmp_path)
    load = transformers.Blip2ForConditionalGeneration.from_pretrained
    model = load(tmp_path, dtype=torch.float16).eval()
    assert {p.dtype for p in model.qformer.parameters()} == {torch.float32}
    query, image = torch.randn(2, 5, 48), images(2, 17, 40)
    exact = model.qformer(query_embeds=query, encoder_hidden_states=image).last_hidden_state
    vlm_fast.patch(model)
    ours = model.qformer(query_embeds=query, encoder_hidden_states=image).last_hidden_state
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    vlm_fast.unpatch(model)
    vlm_fast.patch(model, compute_dtype=torch.bfloat16)
    ours = model.qformer(query_embeds=query, encoder_hidden_states=image).last_hidden_state
    assert ours.dtype == torch.float32 and 1e-4 < (ours - exact).abs().max() < 0.1
    with pytest.raises(ValueError, match="compute_dtype is torch"):
        vlm_fast.patch(model, compute_dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("model", [blip2, instructblip])
def test_missing_or_misshapen_images_raise(model):
    fast = patched(model(**SMALL))
    query = torch.randn(2, 5, 48)
    ids = {} if model is blip2 else dict(input_ids=torch.zeros(2, 3, dtype=torch.long))
    for image in (None, torch.randn(2, 17, 41), torch.randn(3, 17, 40)):
        with pytest.raises(ValueError, match="encoder_hidden_states"):
            fast(query_embeds=query, encoder_hidden_states=image, **ids)


@pytest.mark.parametrize("padding", [[], [(0, 4)]], ids=["", "padded"])
def test_attention_interface(padding):
    name = vlm_fast.register_attention()
    plain, ours = blip2("sdpa", **SMALL), blip2("sdpa", **SMALL)
    ours.set_attn_implementation(name)
    given = dict(encoder_attention_mask=ones_but(2, 17, *padding))
    vlm_fast.stats(reset=True)
    with vlm_fast.strict():
        assert_same(ours, plain, **given)
    # three self-attentions, two cross-attentions
    assert vlm_fast.stats()["cross_attention"]["fast"] == 5


def test_attention_interface_with_text():
    name = vlm_fast.register_attention()
    models = [instructblip("sdpa", **SMALL), instructblip("sdpa", **SMALL)]
    models[0].set_attn_implementation(name)
    given = dict(
        input_ids=torch.ones(2, 3, dtype=torch.long), attention_mask=ones_but(2, 8, (1, 2))
    )
    assert_same(*models, **given)


def test_from_module_refuses_other_modules():
    with pytest.raises(ValueError, match="without 'layernorm'"):
        QFormer.from_module(torch.nn.Linear(2, 2))
