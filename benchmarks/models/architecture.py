"""How a model of the end-to-end benchmark is declared, sized and built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.benchmarks.before_and_after import Part

VOCABULARY = 1024  # smaller than the real one, because embeddings are not measured
WORKING_BYTES = 8 * 2**30  # for activations, a second prompt, and fragmentation
Inputs = dict[str, Tensor]
States = Mapping[str, nn.Module]  # "before" and "after"


@dataclass(frozen=True)
class Architecture:
    """A model of transformers with random weights, in three sizes.

    "whole" is the published one but for its vocabulary, with as many layers of the language model
    as the device holds with what the proof needs. "connector" has the real widths of what
    `vlm_fast.patch` swaps, between a tower and a language model cut to what a CPU runs in seconds.
    "small" is for trying things out.

    Attributes:
        name: of the published model.
        make: ``(size, layers)`` to the model; ``layers`` of the language model, None for the
            size's own. Default dtype and device are set.
        inputs: ``(model, size, batch)`` to arguments, labels among them, and what they are of.
        connectors: what to call a module that the patch swaps, to its class; of several the first.
        layers: how many the whole language model has.
        period: how many of them make up a repeated group; a cut keeps whole groups.
        batch: by size.
        cut: by size, what is not as published, in words.
        acts_in_decoding: whether a generated token passes through a connector.
        more: parts that are no module's.
    """

    name: str
    make: Callable[[str, int | None], nn.Module]
    inputs: Callable[[Any, str, int], tuple[Inputs, str]]
    connectors: Mapping[str, str]
    layers: int
    period: int
    batch: Mapping[str, int]
    cut: Mapping[str, str]
    acts_in_decoding: bool = False
    more: Callable[[States, Inputs], Iterable[Part]] = lambda states, given: ()

    def size_for(self, device: str, *, quick: bool) -> str:
        """The largest size that this device runs in a reasonable time."""
        if quick:
            return "small"
        return "connector" if device == "cpu" or self.layers_that_fit() == 0 else "whole"

    def layers_that_fit(self) -> int:
        """How many layers of the whole language model fit on the current CUDA device in bf16."""
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        one, two = (self._bytes(n * self.period) for n in (1, 2))
        groups = 1 + (total - WORKING_BYTES - one) // (two - one)
        return max(0, min(self.layers, groups * self.period))

    def _bytes(self, layers: int) -> int:
        """Bytes of the parameters and of the gradients of three steps, which `proof` holds."""
        with torch.device("meta"):
            parameters = list(self.make("whole", layers).parameters())
        return sum(2 * p.numel() * (4 if p.requires_grad else 1) for p in parameters)

    def build(self, device: str, dtype: torch.dtype, size: str) -> tuple[nn.Module, str]:
        """Build the model; return it and its description."""
        layers = self.layers_that_fit() if size == "whole" else None
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = self.make(size, layers).eval()
        finally:
            torch.set_default_dtype(before)
        open_gates(model)
        cut = self.cut[size]
        if layers is not None and layers < self.layers:
            cut = f"{layers} of {self.layers} layers"
        return model, f"{self.name} ({cut})" if cut else self.name


def open_gates(model: nn.Module) -> None:
    """Set gates to 0.5 and queries to random values; at their initial 0 nothing would pass."""
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if "gate" in last or "alpha" in last:
            nn.init.constant_(parameter, 0.5)
        elif last == "query_tokens":
            nn.init.normal_(parameter)


def text(batch: int, tokens: int) -> Tensor:
    """Random token ids without special tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, VOCABULARY, (batch, tokens), generator=generator)


def with_images(batch: int, words: int, images: int, token: int) -> Inputs:
    """Prompts with ``images`` image tokens, at another place in each; labels are on the words."""
    ids = text(batch, words + images)
    for sample in range(batch):
        start = 5 + sample % (words - 10)
        ids[sample, start : start + images] = token
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids == token, -100),
    }


def on(given: Inputs, model: nn.Module) -> Inputs:
    """The arguments on the device of the model, with floating tensors in its dtype."""
    parameter = next(model.parameters())
    return {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for name, value in given.items()
    }
