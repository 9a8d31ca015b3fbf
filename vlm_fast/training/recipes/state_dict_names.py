"""Load checkpoints whose names are those of the hub by ``load_state_dict``.

``save_pretrained`` writes weights under the names of a model's first release, and
``from_pretrained`` translates them back. When Trainer resumes, it passes such a checkpoint to
``load_state_dict`` untranslated (LLaVA, transformers 5.17), which loads nothing and only warns. The
hook here translates the names first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def accept_hub_names(model: nn.Module) -> None:
    """Make ``load_state_dict`` of a transformers model accept what ``save_pretrained`` writes."""
    there = [getattr(hook, "hook", None) for hook in model._load_state_dict_pre_hooks.values()]
    if hasattr(model, "save_pretrained") and _own not in there:
        model.register_load_state_dict_pre_hook(_own)


def _own(model: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Pre-hook of ``load_state_dict``.

    Raises:
        ValueError: none of the names in the checkpoint belongs to the model.
    """
    own = [name for name, _ in model.named_parameters()]
    if prefix or not state or any(name in state for name in own):
        return
    for hub, name in hub_names(model).items():
        if hub in state:
            state[name] = state.pop(hub)
    if not any(name in state for name in own):
        raise ValueError(
            f"vlm_fast.training.recipes: a checkpoint has none of the names of "
            f"{type(model).__name__}; its first is {next(iter(state))!r}, expected names such as "
            f"{own[0]!r}"
        )


def hub_names(model: Any) -> dict[str, str]:
    """Map each name that ``save_pretrained`` writes to the model's own name."""
    from transformers.core_model_loading import revert_weight_conversion

    own = list(model.state_dict())
    numbers = {name: torch.tensor(number) for number, name in enumerate(own)}
    return {
        hub: own[int(number)] for hub, number in revert_weight_conversion(model, numbers).items()
    }
