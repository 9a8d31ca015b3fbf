"""Patch of InternVL and Qianfan-OCR: pixel shuffle and the projector's norm in one pass.

The shuffle is a method of the model and the norm a child of the projector. So the method returns a
`DeferredPixelShuffle`, whose patches are still in row-major order. The projector's norm reads them
in shuffled order. Any other function gets a shuffled tensor.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vlm_fast import ops
from vlm_fast.modules.fused_sequence import remembered_run
from vlm_fast.modules.normed_mlp import normed_mlp, recalled_normed_mlp
from vlm_fast.modules.parameter_access.chain import Chain, find_chain
from vlm_fast.modules.parameter_access.norm import why_not_direct_norm
from vlm_fast.modules.token_grid import side_of_square
from vlm_fast.patching.class_swap import is_class
from vlm_fast.patching.deferred_tensor import DeferredTensor
from vlm_fast.patching.models import image_token_merge
from vlm_fast.patching.models.image_token_merge import FusedMerge
from vlm_fast.patching.models.mlp import FusedMLP
from vlm_fast.patching.placeholder_masks import MaskSpec

FACTOR = 2
CALLS = ("layer_norm", "linear_1", "act", "linear_2")


class DeferredPixelShuffle(DeferredTensor):
    """Tokens ``(batch, ..., 4 * features)`` of square grids; the patches are in row-major order."""

    @property
    def shape(self) -> Any:  # type: ignore[override]  # each read by __torch_function__ costs 1 us
        with torch._C.DisableTorchFunctionSubclass():
            return super().shape

    def reshape(self, *shape: Any, **named: Any) -> Any:
        """A `DeferredPixelShuffle` if the last dimension and the batch stay; else a tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            batch, *_, features = super().shape
            if len(shape) == 3 and shape[0] == batch and shape[2] == features:
                return super().reshape(shape).as_subclass(DeferredPixelShuffle)
        return super().reshape(*shape, **named)

    @classmethod
    def shortcut(cls, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs) if func in _SHAPE_FUNCTIONS else None

    @classmethod
    def resolve(cls, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        args, kwargs = tree_map_only(DeferredPixelShuffle, _shuffled, (args, kwargs))
        return args, kwargs


_SHAPE_FUNCTIONS = {Tensor.size, Tensor.dim} | {
    getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad")
}


def _patches(x: Tensor) -> tuple[Tensor, int]:
    """The patches ``(batch, side ** 2, features)`` as a plain tensor, and the side of the grid."""
    x = x.as_subclass(Tensor)
    patches = x.reshape(x.shape[0], -1, x.shape[-1] // FACTOR**2)
    return patches, side_of_square(patches.shape[1])


def _shuffled(x: Tensor) -> Tensor:
    patches, side = _patches(x)
    return ops.pixel_shuffle_norm(patches, height=side, width=side, factor=FACTOR).view(x.shape)


class FusedShuffleMerge(FusedMerge):
    """`FusedMerge` for InternVLModel; its ``pixel_shuffle`` is deferred, or one copy."""

    mirrored_methods: ClassVar[tuple[str, ...]] = ("pixel_shuffle",)

    multi_modal_projector: nn.Module

    def pixel_shuffle(self, vision_features: Tensor, scale_factor: float = 0.5) -> Tensor:
        x = vision_features
        batch, height, width, features = x.shape
        if scale_factor * FACTOR != 1 or height % FACTOR or width % FACTOR:
            return super().pixel_shuffle(x, scale_factor)  # type: ignore[misc]
        down, across = height // FACTOR, width // FACTOR
        shape = (batch, down, across, FACTOR**2 * features)
        projector = self.__dict__["_modules"]["multi_modal_projector"]
        deferred = height == width and isinstance(projector, FusedNormedMLP)
        # A FakeTensor cannot change its type, and the compiler fuses the norm itself.
        if deferred and type(x) is Tensor and not torch.compiler.is_compiling():
            return x.reshape(shape).as_subclass(DeferredPixelShuffle)
        found = ops.pixel_shuffle_norm(x.flatten(1, 2), height=height, width=width, factor=FACTOR)
        return found.view(shape)


class FusedNormedMLP(FusedMLP):
    """`FusedMLP` for InternVL's projector, whose norm takes a `DeferredPixelShuffle` too."""

    layer_norm: nn.Module
    linear_1: nn.Module
    act: nn.Module
    linear_2: nn.Module

    remembered_forward: ClassVar[Any] = staticmethod(lambda self, x: _remembered_run(self, x))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        chain: Chain = self.patch_spec.settings
        x = args[0] if len(args) == 1 and not kwargs else kwargs.get(chain.argument)
        if type(x) is not DeferredPixelShuffle or len(args) + len(kwargs) != 1:
            return super().forward(*args, **kwargs)
        patches, side = _patches(x)
        name, parts = type(self).__name__, normed_mlp(self, _children_of, chain.saved)
        return parts.merged(name, patches, FACTOR, norm_after=True, height=side, width=side)

    def why_not(self) -> str | None:
        return why_not_direct_norm(self.layer_norm, self.linear_1) or super().why_not()


def _remembered_run(module: FusedNormedMLP, x: Any) -> Any:
    """The result by one op that is known to serve; otherwise NotImplemented."""
    if type(x) is not DeferredPixelShuffle:
        return remembered_run(module, x)
    parts = recalled_normed_mlp(module)
    if parts is None:
        return NotImplemented
    patches, side = _patches(x)
    return parts.fused(patches, FACTOR, True, side, side)


_children_of = attrgetter("layer_norm", "linear_1", "act", "linear_2")


def recognise_model(module: nn.Module, **options: Any) -> MaskSpec | str | None:
    """The `MaskSpec` of the model, a reason against, or None for another class."""
    if not (
        is_class(module, "internvl", "InternVLModel")
        or is_class(module, "qianfan_ocr", "QianfanOCRModel")
    ):
        return None
    return image_token_merge.recognise(module)


def recognise_projector(module: nn.Module, *, saved: str, **options: Any) -> Chain | None:
    """The chain of the projector; None for another class or another chain."""
    if not (
        is_class(module, "internvl", "InternVLMultiModalProjector")
        or is_class(module, "qianfan_ocr", "QianfanOCRMultiModalProjector")
    ):
        return None
    chain = find_chain(module, saved)
    return chain if isinstance(chain, Chain) and chain.calls == CALLS else None
