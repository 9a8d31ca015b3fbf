"""``vlm_fast.patch(model)``: find the connectors of a model and make them fast, in place."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn

from vlm_fast.modules.parameter_access.linear import has_replaced_forward
from vlm_fast.modules.parameter_access.original_code import why_not_original_code
from vlm_fast.ops.declaration import FLOATS
from vlm_fast.ops.mlp import SAVED
from vlm_fast.patching.class_swap import (
    PatchedModule,
    swap,
    swap_back,
    why_not_compatible,
    why_not_swapped_back,
)
from vlm_fast.patching.models import (
    anyres,
    aria,
    idefics,
    idefics2,
    image_token_merge,
    internvl,
    kosmos2,
    mllama,
    mlp,
    openflamingo,
    patch_merger,
    perceiver,
    pixel_shuffle,
    pooling,
    qformer,
)
from vlm_fast.patching.towers import modules_in_towers

# Families: a mixin, and the recogniser that returns its recipe, a reason against it, or None. Of
# several that serve a module the first is taken.
FAMILIES: list[tuple[type[PatchedModule], Callable[..., Any]]] = [
    (internvl.FusedShuffleMerge, internvl.recognise_model),
    (internvl.FusedNormedMLP, internvl.recognise_projector),
    (patch_merger.FusedPatchMerger, patch_merger.recognise),
    (patch_merger.FusedUnfoldingMerger, patch_merger.recognise_unfolding),
    (pixel_shuffle.FusedConnector, pixel_shuffle.recognise_connector),
    (pixel_shuffle.FusedGatedProjector, pixel_shuffle.recognise_gated),
    (pixel_shuffle.FusedShuffleMLP, pixel_shuffle.recognise_llama4),
    (pooling.FusedPooledNorm, pooling.recognise_gemma3),
    (pooling.FusedPooledMLP, pooling.recognise_perception_lm),
    (pooling.FusedPooler, pooling.recognise_next_video),
    (pooling.FusedPooledFrames, pooling.recognise_onevision),
    (pooling.FusedFrameProjector, pooling.recognise_frame_projector),
    (mlp.FusedMLP, mlp.recognise),
    (anyres.FusedAnyResMerge, lambda module, **_: anyres.recognise(module)),
    (anyres.FusedAnyRes, lambda module, **_: anyres.recognise_packing(module)),
    (image_token_merge.FusedMerge, lambda module, **_: image_token_merge.recognise(module)),
    (qformer.FusedQFormerModel, qformer.recognise_model),
    (qformer.FusedQFormerEncoder, qformer.recognise_encoder),
    (qformer.FusedQFormerLayer, qformer.recognise_layer),
    (openflamingo.FusedGatedBlock, openflamingo.recognise),
    (perceiver.FusedPerceiver, perceiver.recognise),
    (perceiver.FusedIdeficsPerceiver, perceiver.recognise_idefics),
    (aria.FusedAriaProjector, aria.recognise),
    (kosmos2.FusedKosmosProjection, kosmos2.recognise),
    (idefics2.FusedIdefics2Perceiver, idefics2.recognise_resampler),
    (idefics2.FusedGatedMLP, idefics2.recognise_mlp),
    (idefics.FusedIdeficsModel, idefics.recognise_model),
    (idefics.FusedIdeficsLayer, idefics.recognise_layer),
    (mllama.FusedMllamaModel, mllama.recognise_model),
    (mllama.FusedMllamaLayer, mllama.recognise_layer),
]


@dataclass
class Report:
    """What `patch` did. Also a context manager that reverts at the end.

    Attributes:
        patched: module name to the names of its class and of what serves it now.
        skipped: module name to the reason why a candidate was left as it is, or its merge was, if
            the rest of it is patched.
    """

    patched: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    modules: list[nn.Module] = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Give every module that this report lists its own class back.

        Raises:
            ValueError: a module was sharded or parametrized since; nothing has been changed then.
        """
        _swap_back([module for module in self.modules if isinstance(module, PatchedModule)])
        self.modules.clear()

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.revert()

    def __str__(self) -> str:
        lines = [f"patched {name or '(the model)'}: {what}" for name, what in self.patched.items()]
        lines += [f"skipped {name or '(the model)'}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines) or "nothing to patch"


def patch(
    model: nn.Module,
    *,
    saved: str = "preactivation",
    compute_dtype: torch.dtype | None = None,
    towers: bool = False,
    strict: bool = False,
) -> Report:
    """Swap the class of every connector in ``model`` for one that runs on the fast ops.

    Parameters, ``state_dict`` keys, hooks and class names stay. Patch first, shard or wrap after.
    A second patch finds nothing left to do.

    Args:
        model: a module, as a transformers model; searched with everything inside it.
        saved: what the projectors keep for backward, see `vlm_fast.ops.mlp`.
        compute_dtype: of Q-Formers, whatever the dtype of their parameters (transformers keeps
            those in fp32 under fp16); statistics and accumulation stay in fp32.
        towers: also patch MLPs in stacks of blocks, as of vision towers and language models. They
            keep less for backward; at small batches they may take longer.
        strict: raise if nothing was patched, instead of warning.

    Raises:
        TypeError: ``model`` is no module, or an option is unknown.
        ValueError: ``saved`` or ``compute_dtype`` is unknown; a connector is already sharded by
            FSDP2 or ZeRO-3 (a class swap would strip what they added); nothing was patched under
            ``strict``. Nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if saved not in SAVED:
        raise ValueError(f"saved is {saved!r}, expected one of {SAVED}")
    if compute_dtype not in (None, *FLOATS):
        raise ValueError(f"compute_dtype is {compute_dtype!r}, expected one of {FLOATS} or None")
    report, swaps, already = Report(), [], False
    left = set() if towers else modules_in_towers(model)  # of whose modules no chain is patched
    for name, module in model.named_modules():
        if isinstance(module, PatchedModule):
            already = True
            if module.handles_children:
                left.update(model.get_submodule(name).modules())
            continue
        if type(module).__module__.startswith("vlm_fast."):
            left.update(module.modules())
        options = dict(saved=saved, compute_dtype=compute_dtype, left=module in left)
        for mixin, recognise in FAMILIES:
            recipe = _recipe(recognise, module, **options)
            if recipe is not None and not isinstance(recipe, str):
                recipe = _why_not_restated(module, mixin) or recipe
            if isinstance(recipe, str):
                before = report.skipped.get(name, recipe)
                report.skipped[name] = recipe if before == recipe else f"{before}; {recipe}"
            elif recipe is not None:
                _refuse_if_sharded(name, module)
                swaps.append((name, module, mixin, recipe))
                if mixin.handles_children:
                    left.update(module.modules())
                report.skipped.pop(name, None)
                why_partly_patched = mixin.why_partly_patched(module)
                if why_partly_patched is not None:
                    report.skipped[name] = why_partly_patched
                break
    if not swaps and not already:
        message = f"no connector of {type(model).__name__} was patched\n{report}"
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    for _, module, mixin, recipe in swaps:
        swap(module, mixin, recipe)
    for name, module, mixin, _ in swaps:
        reason = _why_not_asked(module)
        if reason is not None:
            swap_back(module)
            report.skipped[name] = reason
        else:
            report.patched[name] = f"{type(module).__name__} by {mixin.__name__}"
            report.modules.append(module)
    return report


def unpatch(model: nn.Module) -> int:
    """Give every patched module in ``model`` its own class back; returns how many there were.

    Raises:
        ValueError: a module was sharded or parametrized since; nothing has been changed then.
    """
    patched = [module for _, module in patched_modules(model)]
    _swap_back(patched)
    return len(patched)


def _swap_back(modules: list[Any]) -> None:
    """All or none."""
    for module in modules:
        reason = why_not_swapped_back(module)
        if reason is not None:
            raise ValueError(
                f"vlm_fast.unpatch: {type(module).patch_spec.base.__name__} stays patched: {reason}"
            )
    for module in modules:
        swap_back(module)


def patched_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules in ``model`` that are patched."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, PatchedModule))


def explain(model: nn.Module) -> dict[str, str | None]:
    """For every patched module, why its next call would run as plain PyTorch, or None."""
    return {name: module.why_not() for name, module in patched_modules(model)}


def _why_not_restated(module: nn.Module, mixin: type[PatchedModule]) -> str | None:
    """Why the code of a module is not the code that the mixin stands for, or None."""
    kind = type(module)
    if hasattr(mixin, "forward") and has_replaced_forward(module):
        return "its forward has been replaced (accelerate or another wrapper)"
    reason = (
        why_not_original_code(kind, *mixin.mirrored_methods) if mixin.mirrored_methods else None
    )
    other = why_not_compatible(module, mixin)
    return reason if other is None else _of_release(kind, other)


def _recipe(recognise: Callable[..., Any], module: nn.Module, **options: Any) -> Any:
    """What ``recognise`` says; of a class of transformers that lacks what it reads, the version."""
    try:
        return recognise(module, **options)
    except AttributeError as error:
        return _of_release(type(module), str(error))


def _why_not_asked(module: Any) -> str | None:
    """Why a patched module cannot say whether it would run fast, or None."""
    try:
        module.why_not()
    except AttributeError as error:
        return _of_release(type(module), str(error))
    return None


def _of_release(kind: type, reason: str) -> str:
    """What is missing of a class, or unknown, and in which release of transformers."""
    if not kind.__module__.startswith("transformers."):
        return f"{kind.__name__} is not the one that was read: {reason}"
    release = getattr(sys.modules["transformers"], "__version__", "")
    return f"{kind.__name__} of transformers {release} is not the one that was read: {reason}"


def _refuse_if_sharded(name: str, module: nn.Module) -> None:
    why = None
    if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
        why = "is already sharded by FSDP2"
    for parameter_name, parameter in module.named_parameters(recurse=True):
        if hasattr(parameter, "ds_id"):
            why = f"has {parameter_name} partitioned by ZeRO-3"
        elif any(base.__name__ == "DTensor" for base in type(parameter.data).__mro__):
            why = f"has the DTensor {parameter_name}"
    if why is not None:
        raise ValueError(
            f"vlm_fast.patch: {name or 'the model'} {why}; patch the model first, then shard it"
        )
