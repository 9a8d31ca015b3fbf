"""Attention to interleaved media, and layers of IDEFICS and Llama 3.2 Vision that use it.

``before`` is plain PyTorch with a mask of text by all latents, or a layer of transformers.
``after`` is `vlm_fast.ops.media_cross_attention`, or the patched layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vlm_fast
from vlm_fast import ops
from vlm_fast.benchmarks.before_and_after import Part, measure, with_gradients, without_gradients
from vlm_fast.patching.media_masks import MediaMask


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, tokens_per_media: int
) -> Tensor:
    """Flamingo's attention as OpenFlamingo writes it, through a mask of text by all latents."""
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    number = torch.arange(k.shape[2] // tokens_per_media, device=q.device) + 1
    shown = index[:, None, :, None] == number.repeat_interleave(tokens_per_media)
    scores = scores.masked_fill(~shown, -torch.finfo(scores.dtype).max)
    p = (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1)
    return p.masked_fill((index == 0)[:, None, :, None], 0) @ v


def media_core(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Part]:
    """The op: 1024 tokens and 8 images on a CPU, 8 x 2048 tokens and 1 to 16 images on a GPU."""
    shapes = [(1, 1024, 8)] if device == "cpu" else [(8, 2048, n) for n in (1, 4, 16)]
    for batch, text, media in shapes:
        text = 128 if quick else text

        def heads(tokens: int, batch: int = batch) -> Tensor:
            x = torch.randn(batch, tokens, 8, 64, device=device, dtype=dtype)
            return x.transpose(1, 2).requires_grad_()

        q, k, v = heads(text), heads(media * 64), heads(media * 64)
        index = (torch.arange(text, device=device) * media // text + 1).expand(batch, -1)
        called = {
            "before": partial(dense_attention, q, k, v, index, 64),
            "after": partial(ops.media_cross_attention, q, k, v, index, tokens_per_media=64),
        }
        if device == "cuda":
            torch._dynamo.reset()
            called["compiled"] = partial(torch.compile(dense_attention), q, k, v, index, 64)
        name = f"media attention, {batch} x {text} tokens, {media} x 64 latents"
        yield Part(f"{name}, forward", without_gradients(called))
        steps = with_gradients(called, (q, k, v), torch.randn_like(q))
        yield Part(f"{name}, forward and backward", steps, [q, k, v, index])


def idefics_step(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Part]:
    """A generated token in a gated layer of IDEFICS-9B with 8 images."""
    from transformers import IdeficsConfig
    from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

    sizes = dict(hidden_size=256, num_attention_heads=4, intermediate_size=512) if quick else {}
    config = IdeficsConfig(
        qk_layer_norms=True, alpha_initializer="ones", attn_implementation="sdpa",
        vision_config=dict(embed_dim=1280), **sizes,
    )  # fmt: skip
    with torch.device(device):
        before = IdeficsGatedCrossAttentionLayer(config, layer_idx=0).to(dtype).eval()
        x = torch.randn(1, 1, config.hidden_size, dtype=dtype)
        images = torch.randn(1, 8 * 64, 1280, dtype=dtype)
        mask, gate = torch.zeros(1, 1, 1, 8 * 64, dtype=dtype), torch.ones(1, 1, dtype=dtype)
        seen = torch.ones(1, 1, 8, dtype=torch.bool)
    after = copy.deepcopy(before)
    vlm_fast.patch(after, strict=True)
    called = {
        "before": lambda: before(x, None, images, mask, gate),
        "after": lambda: after(
            x, None, images, mask, gate, media_mask=MediaMask.from_bool(seen, seen.shape[:2])
        ),
    }
    yield Part("IDEFICS-9B gated layer, a step, 8 images", without_gradients(called))


def mllama_step(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Part]:
    """A generated token of 4 samples in a cross-attention layer of Llama 3.2 11B Vision.

    This includes the preparation of its mask. transformers prepares it for all 512 earlier tokens,
    once in a step for 8 layers. So one call in eight prepares it.
    """
    from transformers import DynamicCache
    from transformers.models.mllama import modeling_mllama as mllama
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    batch, text, tiles, patches = 4, 512, 4, 64 if quick else 1601
    sizes = (
        dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512)
        if quick
        else {}
    )
    config = MllamaTextConfig(
        cross_attention_layers=[0], attn_implementation="sdpa", **sizes,
    )  # fmt: skip
    with torch.device(device):
        before = mllama.MllamaCrossAttentionDecoderLayer(config, layer_idx=0).to(dtype).eval()
        torch.nn.init.constant_(before.cross_attn_attn_gate, 0.5)
        torch.nn.init.constant_(before.cross_attn_mlp_gate, 0.5)
        x = torch.randn(batch, 1, config.hidden_size, dtype=dtype)
        mask = torch.ones(batch, text + 1, 1, tiles, dtype=torch.long)
        head = config.hidden_size // config.num_attention_heads
        shape = (batch, config.num_key_value_heads, tiles * patches, head)
        keys, values = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    cache = DynamicCache(config=config)
    cache.update(keys, values, 0)
    after = copy.deepcopy(before)
    vlm_fast.patch(after, strict=True)
    calls = 0

    def prepared() -> tuple[Tensor, Tensor]:
        nonlocal calls, ready
        if calls % 8 == 0:
            wide, rows = mllama._prepare_cross_attention_mask(mask, patches, dtype)
            ready = wide[:, :, text:], rows[:, :, text:]
        calls += 1
        return ready

    ready: Any = None

    def old() -> Any:
        wide, rows = prepared()
        return before(x, None, wide, None, rows, past_key_values=cache)

    def new() -> Any:
        seen = mask[:, text:].flatten(2) == 1
        sets = MediaMask.from_bool(seen, seen.shape[:2])
        return after(x, None, None, None, None, past_key_values=cache, media_mask=sets)

    called = {"before": old, "after": new}
    name = f"Llama-3.2-11B-Vision layer, a step of 4, {tiles * patches} keys"
    yield Part(name, without_gradients(called))


def idefics_resampler(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Part]:
    """IDEFICS' resampler of six layers, on ViT-H features of one image on a CPU, of 8 on a GPU."""
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    images, depth = (1, 1) if quick else (1 if device == "cpu" else 8, 6)
    config = IdeficsConfig(
        vision_config=dict(embed_dim=1280), perceiver_config=dict(qk_layer_norms_perceiver=True)
    )
    before = IdeficsPerceiverResampler(config, 1280, depth, 16, 96, 64).to(device, dtype).eval()
    after = copy.deepcopy(before)
    vlm_fast.patch(after, strict=True)
    modules = {"before": before, "after": after}
    if device == "cuda":
        torch._dynamo.reset()
        modules["compiled"] = torch.compile(copy.deepcopy(before))
    x = torch.randn(images, 257, 1280, device=device, dtype=dtype)
    name = f"IDEFICS resampler, {images} x 257 x 1280 to 64, depth {depth}"
    called: dict[str, Callable[[], Any]] = {s: partial(m, x) for s, m in modules.items()}
    yield Part(f"{name}, forward", without_gradients(called))
    upstream = torch.randn(images, 64, 1280, device=device, dtype=dtype)

    def step(module: torch.nn.Module) -> Callable[[], Any]:
        weights = list(module.parameters())
        return lambda: torch.autograd.grad(module(x), weights, upstream)

    steps = {state: step(module) for state, module in modules.items()}
    known = [x, *before.parameters(), *after.parameters()]
    yield Part(f"{name}, training step", steps, known)


PARTS = (media_core, idefics_resampler, idefics_step, mllama_step)


def main(**options: Any) -> dict[str, Any]:
    """See `before_and_after.measure`."""
    return measure("Flamingo", PARTS, **options)
