"""`AnyResPacker`: pack the tiles of images of any resolution into sequences with newlines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.ops.anyres_plan import Plan, plan
from vlm_fast.ops.anyres_tiling import Tiling, sizes_of
from vlm_fast.ops.argument_errors import not_a_tensor

SPLIT_BACKWARDS = ("SplitBackward0", "SplitWithSizesBackward0")


class AnyResPacker(nn.Module):
    """AnyRes packing of LLaVA-NeXT, LLaVA-OneVision and Granite Vision, after the projector.

    Mirrors ``pack_image_features`` of transformers' ``LlavaNextModel``, with its parameter
    ``image_newline (hidden,)``, which is None if ``tiling.newline`` is False.

        packer = AnyResPacker(4096, Tiling(config.image_grid_pinpoints, tile=336, side=24))
        plan = packer.plan(image_sizes, device=features.device)
        rows = packer(features, plan)                             # (packed rows, 4096)
        embeds = packer.merge(inputs_embeds, features, plan, ids == image_token_id)

    Args:
        hidden: width of the features.
        tiling: how the model divides images into tiles.
        device, dtype: of the newline.
    """

    def __init__(
        self,
        hidden: int,
        tiling: Tiling,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tiling = tiling
        newline = torch.randn(hidden, device=device, dtype=dtype) * hidden**-0.5
        self.image_newline = nn.Parameter(newline) if tiling.newline else None

    def plan(
        self,
        image_sizes: Any,
        *,
        tiles: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Plan:
        """The plan of a batch of images, for `forward` and `merge`.

        Make it outside of a CUDA graph or ``torch.compile``. A graph reads the tables of the plan
        at every replay, so keep the plan as long as the graph.

        Args:
            image_sizes: height and width of each image, in pixels; see `anyres_tiling.sizes_of`.
            tiles: the number of tiles of each image, if it is not that of the tiling.
            device: of the features.

        Raises:
            TypeError, ValueError: as `anyres_tiling.sizes_of` and `anyres_plan.plan`.
        """
        return plan(sizes_of(image_sizes), self.tiling, tiles=tiles, device=device)

    def forward(self, features: Tensor | Sequence[Tensor], plan: Plan) -> Tensor:
        """Pack the tiles of all images into ``(packed rows, hidden)``.

        ``plan.counts`` is the number of rows of each image.

        Args:
            features: ``(tiles, tokens, hidden)`` of all images, or one such tensor per image.
            plan: the plan of these images.

        Raises:
            TypeError, ValueError: as `vlm_fast.ops.anyres_pack`.
        """
        return pack_tiles(concatenated(features), self.image_newline, plan)

    def merge(
        self,
        inputs_embeds: Tensor,
        features: Tensor | Sequence[Tensor],
        plan: Plan,
        image_mask: Tensor,
    ) -> Tensor:
        """Replace rows of ``inputs_embeds`` by the packed rows, where ``image_mask`` is true.

        One kernel does both (`vlm_fast.ops.anyres_merge`), unless an image is resized.

        Args:
            inputs_embeds: ``(batch, sequence, hidden)``.
            features, plan: see `forward`.
            image_mask: bool ``(batch, sequence)``.

        Returns:
            A new tensor ``(batch, sequence, hidden)``.

        Raises:
            TypeError, ValueError: as `vlm_fast.ops.anyres_merge`.
        """
        rows = concatenated(features)
        if not plan.is_resized:
            source, target = plan.tables
            return ops.anyres_merge(
                inputs_embeds, rows, self.image_newline, source, target, image_mask
            )
        packed = pack_tiles(rows, self.image_newline, plan)
        return ops.merge_image_tokens(inputs_embeds, packed, image_mask)

    def extra_repr(self) -> str:
        return repr(self.tiling)


def pack_tiles(features: Tensor, image_newline: Tensor | None, plan: Plan) -> Tensor:
    """Pack ``features (tiles, tokens, hidden)`` by the op that the plan was made for."""
    if plan.is_resized:
        return ops.anyres_pack_resized(features, image_newline, *plan.tables)
    return ops.anyres_pack(features, image_newline, *plan.tables)


def concatenated(features: Tensor | Sequence[Tensor]) -> Tensor:
    """Concatenate tensors along dimension 0, without a copy if they are a split of one tensor."""
    if isinstance(features, Tensor):
        return features
    if not isinstance(features, Sequence):
        raise not_a_tensor("AnyResPacker", "features", features)
    features = list(features)
    if len(features) == 1:
        return features[0]
    whole = None if torch.compiler.is_compiling() else _split_source(features)
    return torch.cat(features) if whole is None else whole


def _split_source(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor that ``torch.split`` has divided into ``parts`` along dimension 0, or None."""
    first = parts[0]
    ends = accumulate((part.numel() for part in parts), initial=first.storage_offset())
    for part, start in zip(parts, ends, strict=False):
        if (
            type(part) is not Tensor
            or not part.is_contiguous()
            or part.shape[1:] != first.shape[1:]
        ):
            return None
        if part.dtype != first.dtype or part.storage_offset() != start:
            return None
        if part.untyped_storage()._cdata != first.untyped_storage()._cdata:
            return None
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    if not any(part.requires_grad for part in parts):
        # Strides of the parts are no evidence: along a size of 1 they are arbitrary.
        return first.as_strided((math.prod(shape),), (1,)).view(shape)
    # With gradients the parts must come from torch.split itself: another function may return a view
    # of its input and have its own backward.
    base = first._base
    if base is None or base.grad_fn is None or base.shape != shape or not base.is_contiguous():
        return None
    for part in parts:
        made_by = part.grad_fn
        if part._base is not base or made_by is None or made_by.name() not in SPLIT_BACKWARDS:
            return None
        if made_by.next_functions[0][0] is not base.grad_fn:
            return None
    return base
