"""Patched IDEFICS and Llama 3.2 Vision: parity, generation, caches, fallbacks."""

import copy
import gc

import pytest
import torch
from transformers import DynamicCache

import vlm_fast
from tests.support import tiny_flamingos
from tests.support.cases import assert_right
from vlm_fast.patching import image_kv_cache
from vlm_fast.verification import tolerance

FAMILIES = {
    "idefics": (tiny_flamingos.idefics, tiny_flamingos.idefics_inputs),
    "mllama": (tiny_flamingos.mllama, tiny_flamingos.mllama_inputs),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def pair(family, dtype=torch.float32, **changes):
    """A model, a patched copy, and inputs."""
    build, inputs = FAMILIES[family]
    model = build(**changes).to(dtype)
    fast = copy.deepcopy(model)
    vlm_fast.patch(fast)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs().items()}
    return model, fast, given


def result_and_gradients(model, given):
    """Logits, and gradients of pixels and of parameters."""
    pixels = given["pixel_values"].detach().requires_grad_()
    logits = model(**{**given, "pixel_values": pixels}).logits
    named = dict(model.named_parameters())
    found = torch.autograd.grad(
        logits, [pixels, *named.values()], tolerance.random_upstream(logits), allow_unused=True
    )
    return {"logits": logits.detach(), **dict(zip(["pixels", *named], found, strict=True))}


def assert_same(model, fast, given):
    wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    true = copy.deepcopy(model).double()
    true.set_attn_implementation("sdpa")  # eager attention computes softmax in fp32
    exact = result_and_gradients(true, wide)
    assert_right(
        result_and_gradients(fast, given),
        lambda: result_and_gradients(model, given),
        exact,
        "logits",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_family
def test_parity_with_unpatched(family, dtype):
    model, fast, given = pair(family, dtype)
    with vlm_fast.strict():
        assert_same(model, fast, given)


@pytest.mark.parametrize(
    "changes", [dict(alpha_type="vector"), dict(qk_layer_norms=False)], ids=str
)
def test_parity_of_idefics_variants(changes):
    assert_same(*pair("idefics", **changes))


def projections(model):
    """A list that gets an item whenever an IDEFICS layer projects its images."""
    made = []
    for layer in model.model.gated_cross_attn_layers:
        project = layer._key_values
        layer._key_values = lambda images, p=project: made.append(1) or p(images)
    return made


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_images_are_projected_once_per_generation(mode):
    _, fast, given = pair("idefics")
    made = projections(fast)
    with mode():
        for count in (1, 2):
            fast.generate(**given, max_new_tokens=5, do_sample=False)
            assert len(made) == count * len(fast.model.gated_cross_attn_layers)


def test_image_cache_is_freed_after_generation():
    _, fast, given = pair("idefics")
    with torch.inference_mode():
        found = fast.generate(**given, max_new_tokens=3, return_dict_in_generate=True)
    assert len(image_kv_cache._generations) == 1
    del found
    gc.collect()
    assert not image_kv_cache._generations


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", ["copy_", "data"])
def test_reused_image_buffer_is_read_again(mode, write):
    """The key-value cache object may be reused for several requests, too."""
    model, fast, given = pair("idefics")
    given.pop("pixel_values")
    ids, mask = given["input_ids"], given["image_attention_mask"]
    batch, _, images = mask.shape
    width = model.config.vision_config.embed_dim
    buffer = torch.zeros(batch, images, model.config.perceiver_config.resampler_n_latents, width)
    caches = {m: DynamicCache(config=m.config) for m in (model, fast)}
    step = {"input_ids": ids[:, :1], "image_attention_mask": mask[:, -1:]}

    def assert_same_logits(given):
        one, other = (
            m(**given, perceiver_embeddings=buffer, past_key_values=cache).logits
            for m, cache in caches.items()
        )
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    with mode():
        buffer = buffer.clone()
        for _ in range(3):
            picture = torch.randn_like(buffer)
            buffer.data.copy_(picture) if write == "data" else buffer.copy_(picture)
            for cache in caches.values():
                cache.crop(0)
            assert_same_logits(given)
            assert_same_logits(step)
        if (mode, write) == (torch.no_grad, "copy_"):  # noticed within a generation, too
            buffer.copy_(torch.randn_like(buffer))
            assert_same_logits(step)


def test_full_cross_attention_mask_is_not_built(monkeypatch):
    model, fast, given = pair("mllama")
    prepared = []
    module = "transformers.models.mllama.modeling_mllama._prepare_cross_attention_mask"
    monkeypatch.setattr(module, lambda *a, **k: prepared.append(1))
    with torch.no_grad():
        fast(**given)
    assert not prepared
    with pytest.raises(TypeError), torch.no_grad():
        model(**given)
    assert prepared


@every_family
def test_mlp_bias_is_applied(family):
    model, fast, given = pair(family)
    bias = torch.nn.Parameter(torch.randn(64))
    for m in (model, fast):
        for name, module in m.named_modules():
            if name.endswith("mlp.down_proj") and "vision" not in name:
                module.bias = bias
    with pytest.warns(vlm_fast.VlmFastFallbackWarning, match="it has a bias"), torch.no_grad():
        torch.testing.assert_close(
            fast(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-4
        )


def test_mllama_without_mask_attends_to_all_tiles():
    model, fast, given = pair(
        "mllama"
    )  # eager attention: the default implementation crops and is wrong
    del given["cross_attention_mask"]
    assert_same(model, fast, given)


@pytest.mark.parametrize(
    "family, mask, part",
    [
        ("idefics", "image_attention_mask", (slice(None), slice(1))),
        ("idefics", "image_attention_mask", (slice(1),)),
        ("idefics", "image_attention_mask", (slice(1), slice(1))),
        ("mllama", "cross_attention_mask", (slice(1),)),
    ],
    ids=str,
)
def test_mask_broadcasts_over_tokens_and_batch(family, mask, part):
    model, fast, given = pair(family)
    given[mask] = given[mask][part]
    with vlm_fast.strict():
        assert_same(model, fast, given)


def taken_apart(value):
    """Rebuild nested arguments, as tools do that cast or move the inputs of a module."""
    if isinstance(value, (list, tuple)):
        return type(value)(taken_apart(one) for one in value)
    if isinstance(value, dict):
        return {key: taken_apart(one) for key, one in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_language_model_inputs_can_be_rebuilt_by_hooks():
    model, fast, given = pair("mllama")
    fast.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: (taken_apart(args), taken_apart(kwargs)), with_kwargs=True
    )
    with vlm_fast.strict():
        assert_same(model, fast, given)


def test_language_model_inputs_can_be_exported():
    _, fast, given = pair("mllama")
    seen = {}
    inner = fast.model.language_model
    hook = inner.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        fast(**given, use_cache=False)
        hook.remove()
        exported = torch.export.export(inner, (), seen).module()
        torch.testing.assert_close(
            exported(**seen).last_hidden_state, inner(**seen).last_hidden_state
        )


def test_single_idefics_layer_matches_unpatched():
    model, fast, _ = pair("idefics")
    torch.manual_seed(5)
    x, images = torch.randn(2, 7, 64), torch.randn(2, 12, 40)
    hidden = torch.rand(2, 1, 7, 12) < 0.4
    hidden[:, :, 2] = True
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    given = dict(
        image_hidden_states=images, image_attention_mask=mask,
        cross_attention_gate=(~hidden).any(-1).float().squeeze(1),
    )  # fmt: skip
    with torch.no_grad(), vlm_fast.strict():
        found = fast.model.gated_cross_attn_layers[1](x, **given)
        expected = model.model.gated_cross_attn_layers[1](x, **given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_more_than_64_images_fall_back():
    model, fast, given = pair("idefics")
    mask = given["image_attention_mask"]
    given["image_attention_mask"] = mask.repeat_interleave(22, 2)  # 66
    given["pixel_values"] = given["pixel_values"].repeat_interleave(22, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            fast(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    "family, change, said",
    [
        ("idefics", dict(image_attention_mask=torch.ones(2, 11, 2).long()), "image_attention_mask"),
        ("idefics", dict(image_attention_mask=torch.ones(2, 9, 3).long()), "a row for each token"),
        ("mllama", dict(cross_attention_mask=torch.ones(2, 9, 2, 2).long()), "11 or more"),
        ("mllama", dict(cross_attention_mask=torch.ones(2, 11, 3, 2).long()), "6 tiles"),
    ],
)
def test_invalid_arguments_raise(family, change, said):
    _, fast, given = pair(family)
    with pytest.raises(ValueError, match=said), torch.no_grad():
        fast(**(given | change))


@every_family
def test_verify_covers_the_gated_layers(family, monkeypatch):
    """The base layer gets masks where the patched layer gets sets of images."""
    _, fast, given = pair(family)
    right = vlm_fast.verify(fast, **given)
    layers = [c.name for c in right.connectors if c.what.endswith("Layer")]
    assert right.ok and not right.unreached and len(layers) == 2
    forward = vlm_fast.ops.gated_add._path.forward

    def wrong(*args, **options):
        y, kept = forward(*args, **options)
        return y * 1.001, kept

    monkeypatch.setattr(vlm_fast.ops.gated_add._path, "forward", wrong)
    failed = [c.name for c in vlm_fast.verify(fast, **given).connectors if not c.ok]
    assert failed == layers
