"""Helpers for FSDP2, ZeRO-3 and DDP: modules to shard as one unit, and ranks without images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vlm_fast.modules.parameter_access.sharded_parameters import is_sharded, is_zero3_parameter
from vlm_fast.patching.patched_module import PatchedModule


def connectors(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of each outermost connector that reads its children's parameters.

    Such a module must be sharded as one unit: call ``fully_shard(connector)`` of FSDP2 before
    ``fully_shard(model)``, or set it as a leaf module of ZeRO-3, see `prepare_zero3`. Patched
    modules and modules of `vlm_fast.modules` count as connectors.
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
    """A zero to add to the loss: trainable parameters of ``modules`` get zero gradients, not None.

    For a rank or a batch without images: ``loss = loss + touch_parameters(projector)``. Without it
    DistributedDataParallel waits for gradients that never come. A connector that is called with
    zero images does the same by itself.

    FSDP2 units and ZeRO-3 modules are called, so that all ranks gather parameters alike. Then the
    place and the order matter: call this function where the other ranks run the modules, inside the
    forward of the outermost one (e.g. in a hook of the input embeddings), and pass the modules in
    the order in which they run; for Qwen3-VL ``*visual.deepstack_merger_list, visual.merger``.

    Args:
        modules: modules, or single parameters such as the ``image_newline`` of LLaVA-NeXT.

    Returns:
        A float32 scalar on the device of the parameters; on the CPU if there are none.
    """
    zeros = [_zero_of_module(module) for module in modules]
    return sum(zeros[1:], zeros[0]) if zeros else torch.zeros(())


def _zero_of_module(module: nn.Module | nn.Parameter) -> Tensor:
    if isinstance(module, nn.Parameter):
        return module.reshape(-1)[:0].sum().float()
    if not _gathers(module):
        return _zero_of_parameters(module)

    def forward(*_: Any, **__: Any) -> Tensor:
        return _zero_of_parameters(module)

    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward  # the hooks of its call gather parameters
    try:
        return module()
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def _zero_of_parameters(module: nn.Module) -> Tensor:
    zeros = [
        p.reshape(-1)[:0].sum() for p in module.parameters(recurse=False) if p.requires_grad
    ]  # sums of no element: NaN and infinite parameters do no harm
    zeros += [_zero_of_module(child) for child in module.children()]
    device = next((zero.device for zero in zeros), None)
    return sum((zero.float() for zero in zeros), torch.zeros((), device=device))


def _gathers(module: nn.Module) -> bool:
    """Whether hooks of FSDP2 or of DeepSpeed gather the parameters of this module."""
    if is_sharded(module):
        return True
    return any(map(is_zero3_parameter, module.parameters(recurse=False))) or bool(
        getattr(module, "_z3_leaf", False)
    )


def prepare_zero3(model: nn.Module) -> list[str]:
    """Set the `connectors` of ``model`` as leaf modules of DeepSpeed ZeRO-3.

    Call it after `patch` and before ``deepspeed.initialize``. DeepSpeed then gathers all parameters
    of a connector when the connector is called, and the fused ops run. Otherwise each linear
    gathers its own parameters in its own call, and the connector must call its children.

    A hook makes the inputs of each connector require gradients, which they do not behind a frozen
    tower. Otherwise DeepSpeed (0.19.8) releases the parameters of a leaf module, of any class,
    before their gradients are accumulated. The hook costs computing the gradient of the input.

    Returns:
        The names of the leaf modules.

    Raises:
        ModuleNotFoundError: DeepSpeed 0.13 or newer is not installed.
        ValueError: ``model`` contains no connector.
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
    calls = _LeafCalls()
    model.register_forward_pre_hook(calls.begin)
    model.register_forward_hook(calls.end, always_call=True)
    for module in found.values():
        module.register_forward_pre_hook(calls.count)
        module.register_forward_pre_hook(_require_input_gradients, with_kwargs=True)
    return list(found)


class _LeafCalls:
    """The leaf modules that have been called in the current forward; each may be called once."""

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


def _require_input_gradients(module: nn.Module, args: Any, kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return args, kwargs
    return tree_map_only(Tensor, _require_gradient, (args, kwargs))


def _require_gradient(x: Tensor) -> Tensor:
    return x if x.requires_grad or not x.is_floating_point() else x.detach().requires_grad_()
