"""Q-Formers of transformers, before and after ``vlm_fast.patch``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vlm_fast
from vlm_fast.benchmarks.before_and_after import Part, measure, without_gradients
from vlm_fast.modules import QFormer

BATCH = {"cpu": (4,), "cuda": (1, 64, 8)}  # the most important first
# (name, keys, width of the image features, text tokens)
SHAPES = (
    ("BLIP-2", 257, 1408, 0),
    ("BLIP-2 with ViT-L", 257, 1024, 0),
    ("BLIP-2 at 364 px", 677, 1408, 0),
    ("1025 keys", 1025, 1408, 0),
    ("InstructBLIP, 64 text tokens", 257, 1408, 64),
)


SMALL = {"hidden_size": 96, "num_attention_heads": 2, "num_hidden_layers": 2}


def model(width: int, text: int, **changes: int) -> nn.Module:
    """A Q-Former with random weights and its default config, except for ``changes``."""
    if text:
        from transformers import InstructBlipQFormerConfig
        from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

        return InstructBlipQFormerModel(
            InstructBlipQFormerConfig(encoder_hidden_size=width, **changes)
        ).eval()
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    return Blip2QFormerModel(Blip2QFormerConfig(encoder_hidden_size=width, **changes)).eval()


def inputs(model: Any, batch: int, keys: int, width: int, text: int) -> dict[str, Tensor]:
    """The arguments as in the whole model: the same queries for all images, an open mask."""
    device, dtype = model.device, model.dtype
    query = torch.randn(1, 32, model.config.hidden_size, device=device, dtype=dtype)
    given = dict(
        query_embeds=query.expand(batch, -1, -1),
        encoder_hidden_states=torch.randn(batch, keys, width, device=device, dtype=dtype),
        encoder_attention_mask=torch.ones(batch, keys, dtype=torch.long, device=device),
    )
    if text:
        given["input_ids"] = torch.randint(5, 999, (batch, text), device=device)
        given["attention_mask"] = torch.ones(batch, 32 + text, dtype=torch.long, device=device)
    return given


def qformers(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Part]:
    """BLIP-2's Q-Former with 4 images on a CPU; all Q-Formers with 1, 64 and 8 on a GPU."""
    for name, keys, width, text in SHAPES[:1] if device == "cpu" or quick else SHAPES:
        torch.manual_seed(0)
        before = model(width, text, **(SMALL if quick else {})).to(device, dtype)
        after = copy.deepcopy(before)
        vlm_fast.patch(after, strict=True)
        for batch in BATCH[device]:
            given = inputs(before, batch, keys, width, text)
            yield from _parts(f"{name}, batch {batch}", before, after, given, device)


def _parts(
    name: str, before: nn.Module, after: nn.Module, given: dict[str, Tensor], device: str
) -> Iterator[Part]:
    """Forward and training step; on a GPU also compiled forwards and CUDA graphs."""
    image = given["encoder_hidden_states"].detach().requires_grad_()
    trained = {**given, "encoder_hidden_states": image}
    # Random, because the last LayerNorm turns a constant gradient into zeros and subnormal numbers.
    with torch.no_grad():
        upstream = torch.randn_like(before(**given).last_hidden_state)

    def forward(called: Callable[..., Any], **given: Tensor) -> Tensor:
        return called(**given).last_hidden_state

    def step(
        called: Callable[..., Any], wanted: Sequence[Tensor], **given: Tensor
    ) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(forward(called, **given), wanted, upstream, allow_unused=True)

    states = {"before": before, "after": after}
    weights = {state: list(called.parameters()) for state, called in states.items()}
    forwards: dict[str, Callable[[], Any]]
    forwards = {state: partial(forward, called, **given) for state, called in states.items()}
    steps = {
        state: partial(step, called, weights[state], **given) for state, called in states.items()
    }
    if device == "cuda":
        torch._dynamo.reset()
        forwards["compiled"] = partial(
            forward, torch.compile(before, mode="reduce-overhead"), **given
        )
        steps["compiled"] = partial(step, torch.compile(before), weights["before"], **given)
        if "input_ids" not in given:
            sample = given["query_embeds"].contiguous(), given["encoder_hidden_states"]
            graphed = QFormer.from_module(copy.deepcopy(before)).eval().capture_graph(*sample)
            forwards["graphed"] = partial(graphed, *sample)
    known = [*weights["before"], *weights["after"], *given.values(), image]
    yield Part(f"{name}, forward", without_gradients(forwards))
    yield Part(f"{name}, training step", steps, known)
    with_encoder = {
        state: partial(step, called, [*weights[state], image], **trained)
        for state, called in states.items()
    }
    yield Part(f"{name}, training step, encoder too", with_encoder, known)


PARTS = (qformers,)


def main(**options: Any) -> dict[str, Any]:
    """See `before_and_after.measure`."""
    return measure("Q-Former", PARTS, **options)
