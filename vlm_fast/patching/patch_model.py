"""`patch`, `unpatch` and `explain`: find the connectors of a model and swap their classes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlm_fast.modules.parameter_access.module_calls import FORWARD_REPLACED, has_replaced_forward
from vlm_fast.modules.parameter_access.original_code import why_not_original_code
from vlm_fast.modules.parameter_access.sharded_parameters import why_sharded
from vlm_fast.ops.declaration import FLOATS
from vlm_fast.ops.mlp import SAVED
from vlm_fast.patching.class_swap import swap, swap_back
from vlm_fast.patching.families import FAMILIES
from vlm_fast.patching.patched_module import PatchedModule, why_not_compatible
from vlm_fast.patching.report import Report, patched_modules, swap_back_all
from vlm_fast.patching.towers import modules_in_towers


def patch(
    model: nn.Module,
    *,
    saved: str = "preactivation",
    compute_dtype: torch.dtype | None = None,
    towers: bool = False,
    strict: bool = False,
) -> Report:
    """Swap the class of every known connector in ``model`` for one that runs on the fused ops.

    Parameters, ``state_dict`` keys, hooks and class names stay as they are. Patch before sharding
    or wrapping. A second call finds nothing left to patch.

    Args:
        model: a module, such as a transformers model; all of its submodules are searched.
        saved: which tensors the projectors keep for backward, see `vlm_fast.ops.mlp`.
        compute_dtype: the dtype in which Q-Formers compute, whatever the dtype of their parameters
            (transformers keeps these in float32 under float16). Statistics and accumulation stay in
            float32.
        towers: also patch the MLPs in stacks of blocks, such as vision encoders and language
            models. They then keep less for backward; at small batches they may take longer.
        strict: raise instead of warning if nothing was patched.

    Raises:
        TypeError: ``model`` is not a module, or an option is unknown.
        ValueError: ``saved`` or ``compute_dtype`` is unknown; a connector is already sharded by
            FSDP2 or ZeRO-3 (a class swap would remove what they added); or nothing was patched
            under ``strict``. The model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if saved not in SAVED:
        raise ValueError(f"saved is {saved!r}, expected one of {SAVED}")
    if compute_dtype not in (None, *FLOATS):
        raise ValueError(f"compute_dtype is {compute_dtype!r}, expected one of {FLOATS} or None")
    report = Report()
    swaps, already_patched = _find_swaps(model, report, saved, compute_dtype, towers)
    if not swaps and not already_patched:
        message = f"no connector of {type(model).__name__} was patched\n{report}"
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    for _, module, mixin, settings in swaps:
        swap(module, mixin, settings)
    for name, module, mixin, _ in swaps:
        reason = _why_not_checked(module)
        if reason is not None:
            swap_back(module)
            report.skipped[name] = reason
        else:
            report.patched[name] = f"{type(module).__name__} by {mixin.__name__}"
            report.modules.append(module)
    return report


def unpatch(model: nn.Module) -> int:
    """Give every patched module in ``model`` its original class back.

    Returns:
        The number of modules that were patched.

    Raises:
        ValueError: a module has been sharded or parametrized since; nothing is changed then.
    """
    patched = [module for _, module in patched_modules(model)]
    swap_back_all(patched)
    return len(patched)


def explain(model: nn.Module) -> dict[str, str | None]:
    """For each patched module, by name: why its next call would run as plain PyTorch, or None."""
    return {name: module.why_not() for name, module in patched_modules(model)}


Swap = tuple[str, nn.Module, type[PatchedModule], Any]


def _find_swaps(
    model: nn.Module,
    report: Report,
    saved: str,
    compute_dtype: torch.dtype | None,
    towers: bool,
) -> tuple[list[Swap], bool]:
    """The modules to patch, each with its name, mixin and settings; reasons go to ``report``.

    The second result says whether the model already contains patched modules.
    """
    swaps: list[Swap] = []
    already_patched = False
    # Modules whose chains of linear, activation, linear are not patched by themselves.
    skip_chains = set() if towers else modules_in_towers(model)
    for name, module in model.named_modules():
        if isinstance(module, PatchedModule):
            already_patched = True
            if module.handles_children:
                skip_chains.update(model.get_submodule(name).modules())
            continue
        if type(module).__module__.startswith("vlm_fast."):
            skip_chains.update(module.modules())
        options = dict(
            saved=saved, compute_dtype=compute_dtype, skip_chains=module in skip_chains
        )  # fmt: skip
        for mixin, recognise in FAMILIES:
            found = _recognise(recognise, module, **options)
            if found is not None and not isinstance(found, str):
                found = _why_not_known_class(module, mixin) or found
            if isinstance(found, str):
                before = report.skipped.get(name, found)
                report.skipped[name] = found if before == found else f"{before}; {found}"
            elif found is not None:
                _raise_if_sharded(name, module)
                swaps.append((name, module, mixin, found))
                if mixin.handles_children:
                    skip_chains.update(module.modules())
                report.skipped.pop(name, None)
                partly = mixin.why_partly_patched(module)
                if partly is not None:
                    report.skipped[name] = partly
                break
    return swaps, already_patched


def _recognise(recognise: Callable[..., Any], module: nn.Module, **options: Any) -> Any:
    """The result of a recogniser; a reason if the module lacks an attribute that it reads."""
    try:
        return recognise(module, **options)
    except AttributeError as error:
        return _unknown_release(type(module), str(error))


def _why_not_known_class(module: nn.Module, mixin: type[PatchedModule]) -> str | None:
    """Why the class of a module is not one that the mixin was written for, or None."""
    kind = type(module)
    if hasattr(mixin, "forward") and has_replaced_forward(module):
        return FORWARD_REPLACED
    methods = mixin.mirrored_methods
    reason = why_not_original_code(kind, *methods) if methods else None
    incompatible = why_not_compatible(module, mixin)
    return reason if incompatible is None else _unknown_release(kind, incompatible)


def _why_not_checked(module: Any) -> str | None:
    """Why ``why_not()`` of a patched module cannot be computed, or None."""
    try:
        module.why_not()
    except AttributeError as error:
        return _unknown_release(type(module), str(error))
    return None


def _unknown_release(kind: type, reason: str) -> str:
    """A reason that names the class and, for transformers, its release."""
    if not kind.__module__.startswith("transformers."):
        return f"{kind.__name__} is not the one that was read: {reason}"
    release = getattr(sys.modules["transformers"], "__version__", "")
    return f"{kind.__name__} of transformers {release} is not the one that was read: {reason}"


def _raise_if_sharded(name: str, module: nn.Module) -> None:
    why = why_sharded(module)
    if why is not None:
        raise ValueError(
            f"vlm_fast.patch: {name or 'the model'} {why}; patch the model first, then shard it"
        )
