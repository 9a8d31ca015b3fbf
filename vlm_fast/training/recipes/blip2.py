"""BLIP-2's two training stages as modules whose forward returns the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.training.losses import LanguageModelHead, stage1_loss, stage2_loss

TEMPERATURE = 0.07  # LAVIS' initial value; it is a parameter, clamped to 0.001..0.5
HEAD = "stage1_head.safetensors"


class Objective(nn.Module):
    """A transformers model together with its training loss, for `transformers.Trainer` or any loop.

    Attributes:
        model: the transformers model.
        losses: the terms of the latest loss by name, detached.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.losses: dict[str, Tensor] = {}
        self.register_state_dict_post_hook(_drop_aliases)
        self.register_load_state_dict_pre_hook(_add_aliases)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Enable gradient checkpointing of the model; takes the arguments of its own method."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)

    def save(self, folder: Path) -> None:
        """Save parameters of the stage that are not part of the model, in files of their own.

        The base class has none.

        Args:
            folder: where the model is saved.
        """


class Stage1Objective(Objective):
    """BLIP-2's stage 1 over a frozen vision encoder, with the loss `losses.stage1_loss`.

    The contrastive loss covers the batches of all ranks; accumulated micro-batches do not see each
    other. The language-model head shares its weight with the word embeddings. Head and temperature
    are saved in a file beside the model.

    Args:
        model: transformers' ``Blip2ForImageTextRetrieval``.

    Attributes:
        bos_token_id: id of [DEC], with which generation starts. The default is the last word of the
            vocabulary, where LAVIS puts it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        embeddings = self.model.embeddings.word_embeddings
        eps = self.model.config.qformer_config.layer_norm_eps
        self.head = LanguageModelHead(embeddings, layer_norm_eps=eps)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE, device=embeddings.weight.device))
        self.bos_token_id = len(embeddings.weight) - 1

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> dict[str, Tensor]:
        """Compute the loss.

        Args:
            pixel_values: ``(batch, 3, height, width)``.
            input_ids, attention_mask: ``(batch, tokens)``, see `losses.stage1_loss`. The number of
                tokens must be the same on every rank.

        Returns:
            ``loss`` and its terms ``itc``, ``itm`` and ``itg``, scalars.
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
        """Save the language-model head and the temperature as ``stage1_head.safetensors``."""
        from safetensors.torch import save_file

        kept = {n: t for n, t in self.state_dict().items() if not n.startswith("model.")}
        save_file({n: t.contiguous() for n, t in kept.items()}, folder / HEAD, {"format": "pt"})


class Stage2Objective(Objective):
    """BLIP-2's stage 2 with a frozen language model and the loss `losses.stage2_loss`.

    Args:
        model: transformers' ``Blip2ForConditionalGeneration`` with a decoder.
    """

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss.

        Args:
            pixel_values: ``(batch, 3, height, width)``.
            input_ids, attention_mask, labels: ``(batch, tokens)`` of the text, without image
                tokens, see `losses.stage2_loss`.

        Returns:
            ``loss``, a scalar.
        """
        loss = stage2_loss(self.model, pixel_values, input_ids, attention_mask, labels)
        return {"loss": loss}


def _aliases(module: nn.Module) -> dict[str, str]:
    """Map each further name of a shared parameter to its first name."""
    first: dict[int, str] = {}
    every = module.named_parameters(remove_duplicate=False)
    names = [(name, first.setdefault(id(parameter), name)) for name, parameter in every]
    return {name: own for name, own in names if name != own}


def _drop_aliases(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Remove shared parameters from a state dict except under their first name."""
    for name in _aliases(module):  # safetensors refuses to save a tensor under two names
        state.pop(prefix + name, None)


def _add_aliases(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Add shared parameters to a state dict under all their names."""
    for name, own in _aliases(module).items():
        if prefix + own in state:
            state[prefix + name] = state[prefix + own]
