"""Gated cross-attention layers of language models, and OpenFlamingo's resampler."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from vlm_fast.benchmarks.host.connector import Connector
from vlm_fast.patching.media_masks import MediaMask
from vlm_fast.patching.patched_module import PatchedModule

WORDS, MEDIA = 64, 2
TILES, PATCHES = 4, 1601  # of Llama 3.2 Vision


def idefics() -> nn.Module:
    from transformers import IdeficsConfig
    from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

    config = IdeficsConfig(
        qk_layer_norms=True, alpha_initializer="ones", attn_implementation="sdpa",
        vision_config=dict(embed_dim=1280),
    )  # fmt: skip
    return IdeficsGatedCrossAttentionLayer(config, layer_idx=0)


def idefics_inputs(batch: int) -> tuple[Any, ...]:
    """What IdeficsModel gives its layers: a dense mask, or the sets of images when patched."""
    seen = torch.ones(batch, WORDS, MEDIA, dtype=torch.bool)
    mask = torch.zeros(batch, 1, WORDS, MEDIA * 64)
    gate = torch.ones(batch, WORDS)
    sets = MediaMask.from_bool(seen, seen.shape[:2])
    return torch.randn(batch, WORDS, 4096), torch.randn(batch, MEDIA * 64, 1280), mask, gate, sets


def idefics_call(
    layer: nn.Module, x: Any, images: Any, mask: Any, gate: Any, sets: MediaMask
) -> Any:
    more = {"media_mask": sets} if isinstance(layer, PatchedModule) else {}
    return layer(x, None, images, mask, gate, **more)


def mllama() -> nn.Module:
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig
    from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

    config = MllamaTextConfig(cross_attention_layers=[0], attn_implementation="sdpa")
    return MllamaCrossAttentionDecoderLayer(config, layer_idx=0)


def mllama_inputs(batch: int) -> tuple[Any, ...]:
    """What MllamaModel gives its layers: a dense mask, or the sets of tiles when patched."""
    keys = TILES * PATCHES
    seen = torch.ones(batch, WORDS, TILES, dtype=torch.bool)
    mask, rows = torch.zeros(batch, 1, WORDS, keys), torch.ones(batch, 1, WORDS, 1)
    sets = MediaMask.from_bool(seen, seen.shape[:2])
    return torch.randn(batch, WORDS, 4096), torch.randn(batch, keys, 4096), mask, rows, sets


def mllama_call(
    layer: nn.Module, x: Any, images: Any, mask: Any, rows: Any, sets: MediaMask
) -> Any:
    if isinstance(layer, PatchedModule):
        return layer(x, images, None, None, None, media_mask=sets)
    return layer(x, images, mask, None, rows)


def open_flamingo() -> ModuleType:
    """The file of the package `open_flamingo` with its modules; the package imports much more."""
    spec = importlib.util.find_spec("open_flamingo")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "src" / "helpers.py"
    found = importlib.util.spec_from_file_location("open_flamingo_helpers", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def flamingo_block() -> nn.Module:
    return open_flamingo().GatedCrossAttentionBlock(dim=2048, dim_visual=1024)


def flamingo_inputs(batch: int) -> tuple[Any, ...]:
    places = torch.zeros(batch, WORDS, dtype=torch.bool)
    places[:, :: WORDS // MEDIA] = True
    return torch.randn(batch, WORDS, 2048), torch.randn(batch, MEDIA, 64, 1024), places


def flamingo_resampler() -> nn.Module:
    return open_flamingo().PerceiverResampler(dim=1024, depth=2)


GATED_LAYERS = (
    Connector("IDEFICS-9B gated layer", idefics, idefics_inputs, idefics_call),
    Connector("Llama-3.2-11B-Vision layer", mllama, mllama_inputs, mllama_call),
    Connector("OpenFlamingo-3B gated block", flamingo_block, flamingo_inputs),
    Connector(
        "OpenFlamingo resampler, 2 layers", flamingo_resampler,
        lambda batch: (torch.randn(batch, 1, 1, 256, 1024),),
    ),
)  # fmt: skip
