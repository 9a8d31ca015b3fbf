"""Which transformers models are served, and that a patched one is still the same model."""

import glob
import importlib
import os
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import vlm_fast
from tests.tiny_models import AUDIO, IMAGE, MODELS, build
from vlm_fast.ops import image_tokens
from vlm_fast.patching import image_token_merge, linear_act_linear

PROJECTORS = {
    "llava", "llava of two layers", "llava of pixtral", "llava_next", "llava_next_video",
    "llava_onevision", "vipllava", "video_llava", "fast_vlm", "internvl", "qianfan_ocr",
    "voxtral", "audioflamingo3", "musicflamingo", "glmasr", "qwen3_asr",
}  # fmt: skip
UNMERGED = {
    "deepseek_vl_hybrid", "minimax_m3_vl", "voxtral", "audioflamingo3", "musicflamingo", "glmasr",
    "qwen3_asr",
}  # fmt: skip
MERGED = sorted(MODELS.keys() - UNMERGED)


def merges(name):
    """How many merges a forward has; those of sounds are left as they are."""
    return 0 if name in UNMERGED else sum(p.token != AUDIO for p in MODELS[name].placeholders)


def patch(model):
    """Patch, under pytest's -W error too where there is nothing to patch."""
    with pytest.warns(UserWarning) if type(model).__name__ in UNSERVED else NOTHING:
        return vlm_fast.patch(model)


def step(model, inputs):
    """Everything one training step computes: outputs, loss, hidden states, gradients."""
    model.zero_grad(set_to_none=True)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] > 90, -100)
    output = model(**inputs, labels=labels, output_hidden_states=True)
    output.loss.backward()
    found = dict(tensors(output.to_tuple(), "output"))
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def tensors(value, path):
    """Every tensor in nested outputs and caches, by where it is."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors(item, f"{path}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{path}.{key}")
    elif hasattr(value, "layers") and not isinstance(value, torch.nn.Module):
        yield from tensors([vars(layer) for layer in value.layers], path)


UNSERVED = ()
