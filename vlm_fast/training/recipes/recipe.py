"""A recipe: which parts train, at which learning rate, batch size and schedule.

It provides what `transformers.Trainer` and accelerate need, and replaces neither.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_fast.training.recipes.blip2 import Objective, Stage1Objective, Stage2Objective
from vlm_fast.training.recipes.freezing import freeze_rest, freeze_tower, skip_unused, unfreeze
from vlm_fast.training.recipes.model_parts import CONNECTOR, TOWER, ModelParts, find_parts
from vlm_fast.training.recipes.state_dict_names import accept_hub_names
from vlm_fast.training.recipes.text_only_batches import touch_connector_without_images


@dataclass(frozen=True)
class Recipe:
    """One training stage of a model whose vision encoder is frozen.

    Attributes:
        name: as given to ``vlm-fast recipe``.
        family: of models it is for, one of `model_parts.FAMILIES`.
        trains: the parts to optimise, of "connector" and "language".
        description: these parts in words.
        lr: peak learning rate.
        batch: examples per optimizer step over all processes.
        epochs: passes over the data.
        source: papers of these hyperparameters; says which values are our own choices.
        rates: learning rates of parts that have their own.
        min_lr: final learning rate of the cosine schedule; None keeps the rate constant after
            warmup.
        warmup: steps of linear warmup, or if below 1 their share of all steps.
        weight_decay: of matrices. Vectors (biases, norms, gates) have none.
        undecayed: parameters whose names contain one of these have no weight decay either.
        betas: of AdamW.
    """

    name: str
    family: str
    trains: tuple[str, ...]
    description: str
    lr: float
    batch: int
    epochs: float
    source: str
    rates: Mapping[str, float] = field(default_factory=dict)
    min_lr: float | None = 0.0
    warmup: float = 0.03
    weight_decay: float = 0.0
    undecayed: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)

    def parts(self, model: nn.Module) -> ModelParts:
        """The parts of a model of this recipe's family.

        Raises:
            TypeError: the model is of another family, or its language model has an encoder.
        """
        parts = find_parts(_inner(model))
        if parts.family != self.family:
            raise TypeError(
                f"vlm_fast.training.recipes: {self.name} is given a {type(_inner(model)).__name__}"
                f", of the family {parts.family}, expected one of {self.family}"
            )
        language: Any = getattr(parts.inner, "language_model", None)
        if self.family == "blip2" and language.config.is_encoder_decoder:
            raise TypeError(
                f"vlm_fast.training.recipes: {self.name} is given a {type(language).__name__} with "
                "an encoder, expected a decoder alone"
            )
        return parts

    def prepare(self, model: nn.Module) -> nn.Module:
        """Freeze the parts that do not train, in place.

        Frozen parts stay in eval mode. The vision encoder builds no graph and its unused layers are
        skipped (`freezing.unfreeze` undoes both). Batches without an image give the connector
        gradients of zero. Parameters and state-dict keys do not change. Call `vlm_fast.patch`
        before or after; add LoRA, sharding and DDP after. A model prepared for one stage can be
        prepared for the next.

        Args:
            model: a transformers model.

        Returns:
            The module to train: ``model``, or for BLIP-2 a module around it whose forward is the
                loss.

        Raises:
            TypeError: the model is of another family.
        """
        parts = self.parts(model)
        unfreeze(model)
        for _, parameter, part in parts.label_parameters(model):
            parameter.requires_grad_(part in self.trains)
        config: Any = getattr(model, "config", None)
        if TOWER not in self.trains:
            if self.family == "llava":
                skip_unused(parts.tower, getattr(config, "vision_feature_layer", None))
            freeze_tower(parts.tower)
        freeze_rest(model)
        accept_hub_names(model)
        model.train()
        if self.family in ("llava", "flamingo"):
            touch_connector_without_images(model)
            return model
        return (Stage1Objective if self.family == "blip2-retrieval" else Stage2Objective)(model)

    def parameter_groups(self, model: nn.Module, lr: float | None = None) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: those of each part, with and without weight decay.

        Args:
            model: the result of `prepare`, possibly with peft adapters in it.
            lr: replaces the recipe's peak rate; parts with their own rates are scaled by the same
                factor.

        Returns:
            Dictionaries with ``params``, ``lr``, ``weight_decay`` and ``part``; none is empty.
        """
        scale = 1.0 if lr is None else lr / self.lr
        parts = self.parts(model)
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter, part in parts.label_parameters(_inner(model)):
            if parameter.requires_grad:
                decays = sum(size > 1 for size in parameter.shape) > 1
                decays = decays and not any(own in name for own in self.undecayed)
                groups.setdefault((part, decays), []).append(parameter)
        own = {id(p) for group in groups.values() for p in group}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        for parameter in rest:  # parameters of the stage, such as a temperature or a head
            groups.setdefault((CONNECTOR, parameter.ndim > 1), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": scale * self.rates.get(part, self.lr),
                "weight_decay": self.weight_decay if decays else 0.0,
                "part": part,
            }
            for (part, decays), parameters in groups.items()
        ]

    def optimizer(self, model: nn.Module, lr: float | None = None) -> torch.optim.AdamW:
        """AdamW over `parameter_groups`; arguments as there."""
        groups = self.parameter_groups(model, lr)
        return torch.optim.AdamW(groups, lr=self.lr if lr is None else lr, betas=self.betas)

    def warmup_steps(self, steps: int) -> int:
        """Number of warmup steps, at most a tenth of ``steps``, for short runs."""
        wanted = self.warmup if self.warmup >= 1 else math.ceil(self.warmup * steps)
        return min(int(wanted), steps // 10)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        """The learning-rate scheduler over ``steps``; step it after each optimizer step."""
        from transformers import get_scheduler

        kind, options = self._schedule()
        return get_scheduler(
            kind, optimizer, self.warmup_steps(steps), steps, scheduler_specific_kwargs=options
        )

    def _schedule(self) -> tuple[str, dict[str, float]]:
        if self.min_lr is None:
            return "constant_with_warmup", {}
        if self.min_lr == 0:
            return "cosine", {}
        return "cosine_with_min_lr", {"min_lr_rate": self.min_lr / self.lr}

    def accumulation(
        self, device_batch: int, processes: int | None = None, batch: int | None = None
    ) -> int:
        """Micro-batches per optimizer step that give the recipe's batch on any number of processes.

        Args:
            device_batch: examples on one device at once.
            processes: None reads the launcher's WORLD_SIZE.
            batch: replaces the recipe's.

        Raises:
            ValueError: the batch is not a multiple of ``device_batch * processes``.
        """
        processes = processes or int(os.environ.get("WORLD_SIZE", 1))
        batch = batch or self.batch
        if device_batch < 1 or batch % (device_batch * processes):
            raise ValueError(
                f"vlm_fast.training.recipes: a batch of {batch} is no multiple of {device_batch} "
                f"examples on each of {processes} processes ({device_batch * processes} at once)"
            )
        return batch // (device_batch * processes)

    def steps(
        self,
        examples: int,
        *,
        device_batch: int,
        processes: int | None = None,
        batch: int | None = None,
        epochs: float | None = None,
        whole: bool = False,
    ) -> int:
        """Number of optimizer steps, counted as Trainer counts them.

        Args:
            examples: size of the dataset.
            device_batch, processes, batch: see `accumulation`.
            epochs: replaces the recipe's.
            whole: drop the last incomplete batch.
        """
        at_once = device_batch * (processes or int(os.environ.get("WORLD_SIZE", 1)))
        batches = examples // at_once if whole else math.ceil(examples / at_once)
        an_epoch = math.ceil(batches / self.accumulation(device_batch, processes, batch))
        return max(math.ceil((self.epochs if epochs is None else epochs) * an_epoch), 1)

    def training_arguments(
        self,
        output: Path | str,
        examples: int,
        *,
        device_batch: int,
        batch: int | None = None,
        epochs: float | None = None,
        lr: float | None = None,
        max_steps: int | None = None,
        **others: Any,
    ) -> Any:
        """`transformers.TrainingArguments` of this recipe, for `Trainer` or as settings of a loop.

        Also pass ``optimizers=(recipe.optimizer(model), None)`` to Trainer: its own optimizer has
        no learning rates for parts.

        Args:
            output: the folder that Trainer writes to.
            examples: size of the dataset, for the length of the warmup.
            device_batch: examples on one device at once.
            batch, epochs, lr: replace the recipe's.
            max_steps: last step, of training and of the schedule.
            others: further arguments; they override the recipe's.

        Raises:
            ValueError: see `accumulation`.
        """
        from transformers import TrainingArguments

        accumulation = self.accumulation(device_batch, batch=batch)
        whole = bool(others.get("dataloader_drop_last", self.family == "blip2-retrieval"))
        steps = max_steps or self.steps(
            examples, device_batch=device_batch, batch=batch, epochs=epochs, whole=whole
        )
        kind, options = self._schedule()
        own: dict[str, Any] = {
            "output_dir": str(output),
            "per_device_train_batch_size": device_batch,
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": self.epochs if epochs is None else epochs,
            "max_steps": max_steps or -1,
            "learning_rate": self.lr if lr is None else lr,
            "weight_decay": self.weight_decay,
            "adam_beta1": self.betas[0],
            "adam_beta2": self.betas[1],
            "lr_scheduler_type": kind,
            "lr_scheduler_kwargs": options,
            "warmup_steps": self.warmup_steps(steps),
            "max_grad_norm": 1.0,
            "dataloader_drop_last": whole,  # the contrastive loss needs equal batches
            "remove_unused_columns": False,
            "ddp_find_unused_parameters": False,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "report_to": "none",
        }
        arguments = TrainingArguments(**(own | others))
        if arguments.device.type == "cpu":
            # accelerate gives each process a numbered CPU device, and torch.load does not know
            # cpu:0.
            arguments.__dict__["_setup_devices"] = torch.device("cpu")
        # Without a launcher, Trainer would put one batch on each GPU and enlarge the batch.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        return arguments


def count_parameters(recipe: Recipe, model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each part of a model the number of parameters and the number of trainable ones."""
    total: Counter[str] = Counter()
    learning: Counter[str] = Counter()
    for _, parameter, part in recipe.parts(model).label_parameters(_inner(model)):
        total[part] += parameter.numel()
        learning[part] += parameter.numel() if parameter.requires_grad else 0
    return {part: (count, learning[part]) for part, count in total.items()}


def _inner(model: Any) -> nn.Module:
    """The transformers model inside DDP, a PeftModel or an `Objective`."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    if type(model).__name__ == "DistributedDataParallel":
        return _inner(model.module)
    return model.model if isinstance(model, Objective) else model
