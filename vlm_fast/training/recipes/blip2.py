"""BLIP-2's two stages as modules whose forward is the loss, for a Trainer or any loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.training.losses import LanguageModelHead, stage1_loss, stage2_loss

TEMPERATURE = 0.07  # LAVIS' first; it learns, between 0.001 and 0.5
HEAD = "stage1_head.safetensors"


class Objective(nn.Module):
    """A transformers model, and the loss it is trained with.

    Attributes:
        model: the model, to save.
        losses: the terms of the last forward's loss, detached.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.losses: dict[str, Tensor] = {}
        self.register_state_dict_post_hook(_once)
        self.register_load_state_dict_pre_hook(_twice)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the model's own."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)

    def save(self, folder: Path) -> None:
        """What belongs to the stage and not to the model, in files of its own; nothing here."""


class Stage1Objective(Objective):
    """Contrast, matching and generation over the frozen tower: `objectives.stage1_loss`.

    Contrast is over the batches of all ranks at once; micro-batches that are accumulated do not see
    each other. The head of generation shares its weight with the word embeddings, and is saved
    beside the model, with the temperature.

    Args:
        model: ``Blip2ForImageTextRetrieval``.

    Attributes:
        bos_token_id: of [DEC], with which generation begins: the last word, where LAVIS put it,
            unless it is set to another.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        embeddings = self.model.embeddings.word_embeddings
        eps = self.model.config.qformer_config.layer_norm_eps
        self.head = LanguageModelHead(embeddings, layer_norm_eps=eps)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE, device=embeddings.weight.device))
        self.bos_token_id = len(embeddings.weight) - 1

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
    ) -> dict[str, Tensor]:
        """``loss``, and its terms ``itc``, ``itm`` and ``itg``.

        Args:
            pixel_values: ``(batch, 3, height, width)``.
            input_ids, attention_mask: ``(batch, tokens)``; see `objectives.stage1_loss`. Tokens
                are as many on every rank.
        """
        images = self.model.vision_model(pixel_values=pixel_values).last_hidden_state
        found = stage1_loss(
            self.model, images, input_ids, attention_mask,
            lm_head=self.head, bos_token_id=self.bos_token_id,
            temperature=self.temperature.clamp(0.001, 0.5),
        )  # fmt: skip
        self.losses = {name: getattr(found, name).detach() for name in ("itc", "itm", "itg")}
        return {"loss": found.loss, **self.losses}

    def save(self, folder: Path) -> None:
        """The head of generation and the temperature, as ``stage1_head.safetensors``."""
        from safetensors.torch import save_file

        kept = {n: t for n, t in self.state_dict().items() if not n.startswith("model.")}
        save_file({n: t.contiguous() for n, t in kept.items()}, folder / HEAD, {"format": "pt"})


class Stage2Objective(Objective):
    """Language modelling behind a soft prompt, the language model frozen: `objectives.stage2_loss`.

    Args:
        model: ``Blip2ForConditionalGeneration`` with a decoder.
    """

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``loss``; the arguments are those of `objectives.stage2_loss`, without image tokens."""
        loss = stage2_loss(self.model, pixel_values, input_ids, attention_mask, labels)
        return {"loss": loss}


def _aliases(module: nn.Module) -> dict[str, str]:
    """A parameter's other names, each with its first."""
    first: dict[int, str] = {}
    every = module.named_parameters(remove_duplicate=False)
    names = [(name, first.setdefault(id(parameter), name)) for name, parameter in every]
    return {name: own for name, own in names if name != own}


def _once(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name in _aliases(module):  # safetensors saves no tensor twice
        state.pop(prefix + name, None)


def _twice(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, own in _aliases(module).items():
        if prefix + own in state:
            state[prefix + name] = state[prefix + own]
