"""Connectors in models that are spread over processes: which units they are, and ranks without
images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vlm_fast.patching.patched_module import PatchedModule


def connectors(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules in ``model`` that read the parameters of their children, the outermost.

    What is to stay in one piece: the units of FSDP2 (``fully_shard(connector)`` before
    ``fully_shard(model)``), and the leaf modules of ZeRO-3, see `prepare_zero3`. Those that were
    patched, and those of `vlm_fast.modules`.
    """
    taken: list[nn.Module] = []
    for name, module in model.named_modules():
        if _reads_children(module) and not any(module in outer.modules() for outer in taken):
            taken.append(module)
            yield name, module


def _reads_children(module: nn.Module) -> bool:
    if isinstance(module, PatchedModule):
        return type(module).patch_spec.mixin.why_not is not PatchedModule.why_not  # type: ignore[attr-defined]
    return any(base.__module__.startswith("vlm_fast.modules.") for base in type(module).__mro__)


def touch_parameters(*modules: nn.Module | nn.Parameter) -> Tensor:
    """A zero whose gradient is zero, not None, for every parameter of ``modules`` that trains.

    What a model holds itself, as the ``image_newline`` of models whose images come in tiles, may be
    among them.

    For a rank or a batch without images: ``loss = loss + touch_parameters(projector)``. Otherwise
    DistributedDataParallel waits for gradients that never come. A connector that is called with
    zero images does the same by itself.

    Units of FSDP2 and modules of ZeRO-3 are entered as their own call would, so that all ranks
    gather alike. Then order matters: call this where the other ranks run the modules, inside the
    forward of the outermost one, as in a hook of the input embeddings, and give them in the order
    in which they run: ``*visual.deepstack_merger_list, visual.merger`` of Qwen3-VL.

    Returns:
        A scalar; float32 if there is no parameter at all.
    """
    zeros = [_touched(module) for module in modules]
    return sum(zeros[1:], zeros[0]) if zeros else torch.zeros(())


def _touched(module: nn.Module | nn.Parameter) -> Tensor:
    if isinstance(module, nn.Parameter):
        return module.reshape(-1)[:0].sum().float()
    if not _gathers(module):
        return _zero_of(module)

    def forward(*_: Any, **__: Any) -> Tensor:
        return _zero_of(module)

    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward  # within its call: hooks gather, and watch the result
    try:
        return module()
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def _zero_of(module: nn.Module) -> Tensor:
    zeros = [
        p.reshape(-1)[:0].sum() for p in module.parameters(recurse=False) if p.requires_grad
    ]  # of no element: NaN and infinities stay where they are
    zeros += [_touched(child) for child in module.children()]
    device = next((zero.device for zero in zeros), None)
    return sum((zero.float() for zero in zeros), torch.zeros((), device=device))


def is_sharded(module: nn.Module) -> bool:
    """Whether this module is a unit of FSDP2."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _gathers(module: nn.Module) -> bool:
    """Whether hooks of this module gather its parameters: FSDP2's, or DeepSpeed's."""
    if is_sharded(module):
        return True
    return any(hasattr(p, "ds_id") for p in module.parameters(recurse=False)) or bool(
        getattr(module, "_z3_leaf", False)
    )


def prepare_zero3(model: nn.Module) -> list[str]:
    """Set the `connectors` of ``model`` as leaf modules of ZeRO-3; after `patch`, before
    ``deepspeed.initialize``.

    DeepSpeed then gathers all parameters of a connector when it is called, and it is fused;
    without, each linear gathers its own in its own call, and the connector calls its children.

    A hook makes the inputs of each ask for gradients, as behind a frozen tower they do not:
    otherwise DeepSpeed (0.19.8) lets a leaf's parameters go before their gradients are added, of
    any class. It costs the gradient of the input.

    Returns:
        The names of the leaf modules.

    Raises:
        ModuleNotFoundError: DeepSpeed 0.13 or newer is not installed.
        ValueError: there is no connector in ``model``.
    """
    try:
        from deepspeed.utils import set_z3_leaf_modules
    except ImportError as error:
        raise ModuleNotFoundError(
            "vlm_fast.prepare_zero3 needs DeepSpeed 0.13 or newer: pip install deepspeed"
        ) from error
    found = dict(connectors(model))
    if not found:
        raise ValueError(
            f"vlm_fast.prepare_zero3: model is a {type(model).__name__} without a connector; "
            "patch it first"
        )
    set_z3_leaf_modules(model, list({type(module) for module in found.values()}))
    calls = _Calls()
    model.register_forward_pre_hook(calls.begin)
    model.register_forward_hook(calls.end, always_call=True)
    for module in found.values():
        module.register_forward_pre_hook(calls.count)
        module.register_forward_pre_hook(_asking_for_gradients, with_kwargs=True)
    return list(found)


class _Calls:
    """Which leaf modules were called in the forward that runs now."""

    def __init__(self) -> None:
        self.called: list[nn.Module] | None = None

    def begin(self, *_: Any) -> None:
        self.called = []

    def end(self, *_: Any) -> None:
        self.called = None

    def count(self, module: nn.Module, *_: Any) -> None:
        if self.called is None or not torch.is_grad_enabled():
            return
        if any(module is other for other in self.called):
            raise RuntimeError(
                f"vlm_fast.prepare_zero3: a {type(module).__name__} is called twice in one "
                "forward, as for pictures and a video of one batch, expected once: DeepSpeed "
                "reduces the gradients of a leaf module after one call; give pictures and videos "
                "in batches of their own, or leave prepare_zero3 out"
            )
        self.called.append(module)


def _asking_for_gradients(module: nn.Module, args: Any, kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return args, kwargs
    return tree_map_only(Tensor, _asking, (args, kwargs))


def _asking(x: Tensor) -> Tensor:
    return x if x.requires_grad or not x.is_floating_point() else x.detach().requires_grad_()
