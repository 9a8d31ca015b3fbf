"""Checkpoints in the hub's names, loaded by ``load_state_dict``.

``save_pretrained`` writes a model's weights under the names that its first release had, and
``from_pretrained`` reads them back; Trainer, when it resumes, hands them to ``load_state_dict`` as
they are, which finds none of its own (a LLaVA's, with transformers 5.17) and goes on with the
weights of before, with a warning. Here such names are translated first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def accept_hub_names(model: nn.Module) -> None:
    """Have ``load_state_dict`` of a transformers model take what ``save_pretrained`` writes."""
    there = [getattr(hook, "hook", None) for hook in model._load_state_dict_pre_hooks.values()]
    if hasattr(model, "save_pretrained") and _own not in there:
        model.register_load_state_dict_pre_hook(_own)


def _own(model: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    own = [name for name, _ in model.named_parameters()]
    if prefix or not state or any(name in state for name in own):
        return
    for hub, name in hub_names(model).items():
        if hub in state:
            state[name] = state.pop(hub)
    if not any(name in state for name in own):
        raise ValueError(
            f"vlm_fast.training.recipes: a checkpoint has no name of {type(model).__name__}"
            f"; its first is {next(iter(state))!r}, expected such as {own[0]!r}"
        )


def hub_names(model: Any) -> dict[str, str]:
    """The model's own name for each that ``save_pretrained`` writes."""
    from transformers.core_model_loading import revert_weight_conversion

    own = list(model.state_dict())
    numbers = {name: torch.tensor(number) for number, name in enumerate(own)}
    return {
        hub: own[int(number)] for hub, number in revert_weight_conversion(model, numbers).items()
    }
