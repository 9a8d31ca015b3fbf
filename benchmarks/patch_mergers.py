"""Patch mergers and poolings of transformers, patched and not, and the ops in them.

``before`` is transformers' code, ``after`` the op or the patched module.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vlm_fast
from vlm_fast import ops
from vlm_fast.benchmarks.before_and_after import Part, measure, with_gradients, without_gradients


def internvl_core(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Part]:
    """InternVL's pixel shuffle and the LayerNorm after it, on tiles with a CLS token."""
    from transformers.models.internvl.modeling_internvl import InternVLModel

    features = 64 if quick else 1024
    norm = nn.LayerNorm(4 * features, device=device, dtype=dtype)
    for tiles in (1, 4, 13) if device == "cpu" else (13, 64):
        hidden = torch.randn(tiles, 1025, features, device=device, dtype=dtype)

        def before(hidden: Tensor = hidden, tiles: int = tiles) -> Tensor:
            x = hidden[:, 1:].reshape(tiles, 32, 32, -1)
            return norm(InternVLModel.pixel_shuffle(None, x, 0.5).reshape(tiles, 256, -1))

        def after(hidden: Tensor = hidden) -> Tensor:
            return ops.pixel_shuffle_norm(
                hidden[:, 1:], norm.weight, norm.bias, height=32, width=32, norm="layer"
            )

        called: dict[str, Callable[..., Tensor]] = {"before": before, "after": after}
        if device == "cuda":
            torch._dynamo.reset()
            called["compiled"] = torch.compile(before)
        name = f"InternVL shuffle and norm, {tiles} x 1024 x {features}"
        yield Part(f"{name}, forward", without_gradients(called))
        wanted = hidden.clone().requires_grad_()
        upstream = torch.randn(tiles, 256, 4 * features, device=device, dtype=dtype)
        known = [wanted, norm.weight, norm.bias]
        steps = with_gradients({s: partial(f, wanted) for s, f in called.items()}, known, upstream)
        yield Part(f"{name}, forward and backward", steps, known)


def mergers(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Part]:
    """Qwen2.5-VL's norm and merge without the MLP, then patched projectors and poolings."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

    features, patches = (64, 256) if quick else (1280, 2048 if device == "cpu" else 16384)
    norm = Qwen2_5_VLRMSNorm(features).to(device, dtype)
    x = torch.randn(patches, features, device=device, dtype=dtype)
    called: dict[str, Callable[[], Any]] = {
        "before": lambda: norm(x).view(-1, 4 * features),
        "after": lambda: ops.pixel_shuffle_norm(
            x, norm.weight, height=patches // 2, width=2, norm="rms", norm_after=False, eps=1e-6
        ),
    }
    name = f"Qwen2.5-VL norm and merge, {patches} x {features}, forward"
    yield Part(name, without_gradients(called))
    for name, module, args in (
        ("Gemma 3", *_gemma3(device, dtype, quick)),
        ("PerceptionLM", *_perception_lm(device, dtype, quick)),
        ("LLaVA-NeXT-Video pooling", *_next_video(device, dtype, quick)),
    ):
        after = copy.deepcopy(module)
        vlm_fast.patch(after, strict=True)
        called = {"before": partial(module, args), "after": partial(after, args)}
        shape = " x ".join(map(str, args.shape))
        yield Part(f"{name}, {shape}, forward", without_gradients(called))


def _gemma3(device: str, dtype: torch.dtype, quick: bool) -> tuple[nn.Module, Tensor]:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    features, text, images = (48, 64, 1) if quick else (1152, 2560, 1 if device == "cpu" else 8)
    vision = types.SimpleNamespace(
        hidden_size=features, layer_norm_eps=1e-6, image_size=896, patch_size=14
    )
    config: Any = types.SimpleNamespace(
        vision_config=vision, text_config=types.SimpleNamespace(hidden_size=text),
        mm_tokens_per_image=256,
    )  # fmt: skip
    module = Gemma3MultiModalProjector(config).to(device, dtype)
    nn.init.normal_(module.mm_input_projection_weight, std=0.02)
    return module, torch.randn(images, 4096, features, device=device, dtype=dtype)


def _perception_lm(device: str, dtype: torch.dtype, quick: bool) -> tuple[nn.Module, Tensor]:
    from transformers.models.perception_lm.modeling_perception_lm import (
        PerceptionLMMultiModalProjector,
    )

    features, text, tiles = (48, 64, 1) if quick else (1536, 4096, 1 if device == "cpu" else 37)
    config: Any = types.SimpleNamespace(
        vision_config=types.SimpleNamespace(model_args={"embed_dim": features}),
        text_config=types.SimpleNamespace(hidden_size=text), projector_pooling_ratio=2,
    )  # fmt: skip
    module = PerceptionLMMultiModalProjector(config).to(device, dtype)
    return module, torch.randn(tiles, 1024, features, device=device, dtype=dtype)


def _next_video(device: str, dtype: torch.dtype, quick: bool) -> tuple[nn.Module, Tensor]:
    from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler

    features = 48 if quick else 1024
    vision = types.SimpleNamespace(image_size=336, patch_size=14, hidden_size=features)
    config: Any = types.SimpleNamespace(
        vision_config=vision, spatial_pool_mode="average", spatial_pool_stride=2
    )
    frames = torch.randn(1 if quick else 32, 577, features, device=device, dtype=dtype)[:, 1:]
    return LlavaNextVideoPooler(config), frames


PARTS = (internvl_core, mergers)


def main(**options: Any) -> dict[str, Any]:
    """See `before_and_after.measure`."""
    return measure("Mergers and pooling", PARTS, **options)
