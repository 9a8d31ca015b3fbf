"""Run a recipe on local files: load, patch, train with Trainer, save."""

from __future__ import annotations

import copy
import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

import vlm_fast
from vlm_fast import terminal
from vlm_fast.ops.declaration import DTYPES
from vlm_fast.training.data import Captions, Collator, Conversations
from vlm_fast.training.data.images import WHITE, Colour
from vlm_fast.training.data.record_errors import OnBad
from vlm_fast.training.data.records import Records
from vlm_fast.training.recipes import callbacks, checkpoints
from vlm_fast.training.recipes.blip2 import Objective, Stage1Objective
from vlm_fast.training.recipes.captions import CaptionCollator
from vlm_fast.training.recipes.model_parts import LANGUAGE
from vlm_fast.training.recipes.recipe import Recipe

RUN = "run.json"
logger = logging.getLogger(__name__)
# LLaVA-1.5's settings for LoRA: learning rates of adapters and projector, and dropout; alpha is 2 *
# rank.
LORA_LR, LORA_CONNECTOR_LR, LORA_DROPOUT = 2e-4, 2e-5, 0.05


@dataclass(frozen=True)
class RecipeRun:
    """The settings of a run.

    Attributes:
        recipe: the recipe.
        model: folder of a transformers model and its processor.
        data: LLaVA's conversation JSON or JSONL.
        images: the folder of images.
        out: the folder of checkpoints and of the trained model.
        epochs, lr, batch: replace the recipe's.
        device_batch: examples on one device at once.
        max_steps: last step; None trains all epochs.
        save_every: steps between checkpoints.
        seed: of the data order, new parameters and dropout.
        dtype: name of the dtype to compute in; None is the model's own.
        checkpointing: whether to recompute activations in backward.
        lora: rank of adapters in the language model; None trains it in full.
        on_bad: "stop" or "skip", what to do with bad records.
        format: of conversations, one of `chat_formats.FORMATS`.
        max_length: tokens of an example.
        background: colour behind transparent pixels.
        patch: whether to use `vlm_fast.patch`.
        workers: data loader processes.
    """

    recipe: Recipe
    model: Path
    data: Path
    images: Path
    out: Path
    epochs: float | None = None
    lr: float | None = None
    batch: int | None = None
    device_batch: int = 4
    max_steps: int | None = None
    save_every: int = 500
    seed: int = 42
    dtype: str | None = None
    checkpointing: bool = False
    lora: int | None = None
    on_bad: OnBad = "stop"
    format: str | None = None
    max_length: int | None = None
    background: Colour = WHITE
    patch: bool = True
    workers: int = 2

    @property
    def effective_recipe(self) -> Recipe:
        """The recipe, with LLaVA's learning rates for adapters if there are any."""
        if self.lora is None:
            return self.recipe
        return replace(self.recipe, lr=LORA_LR, rates={"connector": LORA_CONNECTOR_LR})

    def fixed_settings(self) -> dict[str, Any]:
        """The settings that must not change when a run is resumed, as JSON values."""
        recipe = self.effective_recipe
        names = ("seed", "dtype", "lora", "format", "max_length", "max_steps")
        background = list(self.background)  # a list, as JSON returns it
        paths = ("model", "data", "images")
        return {
            "recipe": recipe.name,
            **{name: str(getattr(self, name).resolve()) for name in paths},
            "epochs": self.epochs or recipe.epochs,
            "lr": self.lr or recipe.lr,
            "batch": self.batch or recipe.batch,
            "background": background,
            **{name: getattr(self, name) for name in names},
        }


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        steps: optimizer steps so far.
        of: steps of the complete run.
        losses: of the first and the last logged step.
        checkpoint: name of the last complete checkpoint.
        resumed_from: name of the checkpoint that the run started from.
        interrupted: whether a signal ended the run.
        replaced: number of records that others replaced.
    """

    steps: int
    of: int
    losses: tuple[float, float] | None
    checkpoint: str | None
    resumed_from: str | None
    interrupted: bool
    replaced: int


def model_class(folder: Path) -> tuple[Any, Any]:
    """The transformers class of a local checkpoint, and its config.

    Raises:
        ValueError: the config is missing, or names a class that transformers does not have.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"{folder} has no config that transformers reads: {first}") from None
    named = (config.architectures or [""])[0]
    found = getattr(transformers, named, None)
    if found is None:
        raise ValueError(
            f"{folder / 'config.json'} names the class {named!r}, which transformers "
            f"{transformers.__version__} does not have"
        )
    return found, config


@dataclass(frozen=True)
class PretrainedState:
    """What saving restores: the config and dtypes that the model had on disk."""

    config: Any
    dtypes: dict[str, torch.dtype]


def load(run: RecipeRun) -> tuple[nn.Module, PretrainedState]:
    """Load the model in the dtype of its files, with its `PretrainedState`."""
    found, _ = model_class(run.model)
    model = found.from_pretrained(run.model, dtype="auto", local_files_only=True)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    return model, PretrainedState(copy.deepcopy(model.config), dtypes)


def compute_dtype(run: RecipeRun, model: Any) -> torch.dtype:
    """The dtype that forward and backward compute in."""
    return model.dtype if run.dtype is None else DTYPES[run.dtype]


def prepare(run: RecipeRun, model: nn.Module) -> nn.Module:
    """Patch, freeze, add adapters, and convert trainable weights to float32.

    Returns:
        The module that Trainer trains.
    """
    dtype = compute_dtype(run, model)
    if run.patch:
        report = vlm_fast.patch(model)
        skipped = f"; left as they are: {len(report.skipped)}" if report.skipped else ""
        logger.info("%d modules are patched%s", len(report.patched), skipped)
    trained = run.recipe.prepare(model)
    if run.lora is not None:
        trained = add_adapters(run, model)
    for parameter in trained.parameters():
        if parameter.requires_grad or dtype == torch.float32:
            # frozen weights keep their dtype, so that they are never rounded
            parameter.data = parameter.data.float()
    return trained


def add_adapters(run: RecipeRun, model: nn.Module) -> nn.Module:
    """Add LoRA to every linear of the language model's layers; the connector trains in full."""
    from peft import LoraConfig, get_peft_model

    parts = run.recipe.parts(model)
    of = {name.rpartition(".")[0]: part for name, _, part in parts.label_parameters(model)}
    head: Any = getattr(model, "lm_head", None)
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and of.get(name) == LANGUAGE and module is not head
    ]
    connector = [
        name.rpartition(".")[2] for name in parts.connector if not name.endswith("newline")
    ]
    rank: int = run.lora  # type: ignore[assignment]
    return get_peft_model(
        model,
        LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=LORA_DROPOUT, target_modules=linears,
            modules_to_save=connector,
        ),
    )  # fmt: skip


def dataset_and_collator(run: RecipeRun, processor: Any) -> tuple[Any, Any]:
    """The dataset, without malformed records, and the collator of a run."""
    records = Records(run.data, on_bad="skip")
    options: Any = {"on_bad": run.on_bad, "background": run.background}
    if run.recipe.family == "blip2-retrieval":
        collator: Any = CaptionCollator(processor, pad_to_length=True)
        return Captions(records, run.images, **options), collator
    if run.recipe.family == "blip2":
        return Captions(records, run.images, **options), CaptionCollator(processor, suffix="\n")
    plain = run.recipe.name == "llava-stage1" and bool(records.has_image.all())
    collator = Collator(
        processor, format=run.format or ("plain" if plain else None), max_length=run.max_length
    )
    return Conversations(records, run.images, **options), collator


def without_records(dataset: Any, bad_records: list[int]) -> Any:
    """The dataset without the records of these numbers in the file."""
    if not bad_records:
        return dataset
    bad = set(bad_records)
    return Subset(dataset, [n for n in range(len(dataset)) if dataset.record(n).index not in bad])


def train(
    run: RecipeRun, processor: Any, bad_records: list[int], resume: Path | None, main: bool
) -> RunResult:
    """Train with checkpoints in ``run.out``, and save the model there.

    Args:
        processor: of the model.
        bad_records: numbers of records in the file that are left out.
        resume: the checkpoint to resume from; None starts from the beginning.
        main: whether this process writes files and shows progress.

    Raises:
        BadRecord: a record cannot be used and ``on_bad`` is "stop"; checkpoints are kept.
    """
    from transformers import PrinterCallback, Trainer, set_seed
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and saving; `terminal.counter` shows progress
    set_seed(run.seed)  # heads and adapters are initialised randomly
    model, pretrained = load(run)
    dtype = compute_dtype(run, model)
    trained = prepare(run, model)
    if isinstance(trained, Stage1Objective):
        trained.bos_token_id = processor.tokenizer.bos_token_id
    every, collator = dataset_and_collator(run, processor)
    dataset = without_records(every, bad_records)
    arguments = run.effective_recipe.training_arguments(
        run.out, len(dataset), device_batch=run.device_batch, batch=run.batch, epochs=run.epochs,
        lr=run.lr, max_steps=run.max_steps, seed=run.seed, save_strategy="steps",
        save_steps=run.save_every, logging_steps=1, logging_nan_inf_filter=False,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16,
        gradient_checkpointing=run.checkpointing, dataloader_num_workers=run.workers,
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    if main:
        (run.out / RUN).write_text(json.dumps(run.fixed_settings(), indent=1))
    progress = terminal.counter("training") if main else nullcontext(lambda done, total: None)
    with progress as count, callbacks.stop_on_signal() as stop_signal:
        callback = callbacks.make_callback(run.out, stop_signal, count, trained)
        trainer = Trainer(
            trained,
            arguments, train_dataset=dataset, data_collator=collator,
            optimizers=(run.effective_recipe.optimizer(trained, run.lr), None),
            callbacks=[callback],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    state = trainer.state
    if main and not callback.interrupted:
        save(run, trained, pretrained, processor)
    losses = [row["loss"] for row in state.log_history if "loss" in row]
    last, _ = checkpoints.last_complete(run.out)
    return RunResult(
        state.global_step, state.max_steps, (losses[0], losses[-1]) if losses else None,
        None if last is None else last.name, None if resume is None else resume.name,
        callback.interrupted, every.replaced,
    )  # fmt: skip


def save(run: RecipeRun, trained: Any, pretrained: PretrainedState, processor: Any) -> None:
    """Save the model under transformers' keys and in its original dtypes, and its processor.

    Adapters are saved separately and then merged. An `Objective` saves its own parameters.
    """
    if run.lora is not None:
        trained.save_pretrained(run.out / "adapter")
        trained = trained.merge_and_unload()
    if isinstance(trained, Objective):
        trained.save(run.out)
    model: Any = trained.model if isinstance(trained, Objective) else trained
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data = tensor.data.to(pretrained.dtypes.get(name, tensor.dtype))
    model.config = pretrained.config  # Trainer sets use_cache to False
    model.save_pretrained(run.out)
    processor.save_pretrained(run.out)
