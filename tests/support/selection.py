"""Selections of long lists for `make test`; the rest is slow and runs in `make test-slow`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

# Small models of transformers, one for each class that is patched and each way of merging images.
REPRESENTATIVES = (
    "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "idefics3", "cohere2_vision",
    "llama4", "gemma3", "llava_next_video", "llava_onevision", "aria", "llava", "llava_next",
)  # fmt: skip


def slow_except(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Test parameters in which all ``values`` that are not in ``quick`` are marked slow."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]
