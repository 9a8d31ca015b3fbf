"""AnyRes tiles, packed and merged into the prompt, as in LLaVA-NeXT and in LLaVA-OneVision.

``before`` is ``pack_image_features`` of transformers, ``cat`` and ``masked_scatter``. ``after``
packs with one op and merges with another, as a patched model does. ``at once`` is
`ops.anyres_merge`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vlm_fast import ops
from vlm_fast.benchmarks.before_and_after import Part, measure, with_gradients, without_gradients
from vlm_fast.modules.anyres_packer import concatenated, pack_tiles
from vlm_fast.ops.anyres_plan import Plan, plan
from vlm_fast.ops.anyres_tiling import Tiling, tile_count

TEXT = 128  # tokens a prompt has beside its image's


def llava_next(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Part]:
    """A base tile and 2 x 2 tiles of 576 tokens, one image in each prompt."""
    from transformers import LlavaNextConfig
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    config = LlavaNextConfig()
    tiling = Tiling(config.image_grid_pinpoints, tile=336, side=24)
    pack = partial(
        LlavaNextModel.pack_image_features, SimpleNamespace(config=config),
        vision_feature_select_strategy="default",
    )  # fmt: skip
    for images in (4,) if device == "cpu" else (1, 8, 16):
        hidden = 64 if quick else 4096
        name = f"LLaVA-NeXT, {images} x 2928 x {hidden}"
        yield from _pack_and_merge(name, pack, tiling, [(672, 672)] * images, hidden, device, dtype)


def llava_onevision(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Part]:
    """A base tile and 4 x 4 tiles of 729 tokens, resized to 81 x 81."""
    from transformers import LlavaOnevisionConfig, SiglipVisionConfig
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    config = LlavaOnevisionConfig(vision_config=SiglipVisionConfig(image_size=384, patch_size=14))
    tiling = Tiling(config.image_grid_pinpoints, tile=384, side=27, max_tiles=9)
    pack = partial(LlavaOnevisionModel.pack_image_features, SimpleNamespace(config=config))
    images, hidden = (1 if device == "cpu" else 8), (64 if quick else 3584)
    sizes = [(1536, 1536)] * images
    name = f"LLaVA-OneVision, {images} x 17 tiles x {hidden}"
    yield from _pack_and_merge(name, pack, tiling, sizes, hidden, device, dtype)


def _pack_and_merge(
    name: str, pack: Callable[..., Any], tiling: Tiling, sizes: list[tuple[int, int]],
    hidden: int, device: str, dtype: torch.dtype,
) -> Iterator[Part]:  # fmt: skip
    tiles = [tile_count(size, tiling) for size in sizes]
    made = plan(sizes, tiling, device=device)
    length = max(made.counts) + TEXT
    make = partial(torch.randn, device=device, dtype=dtype)
    features = make(sum(tiles), tiling.side**2, hidden).requires_grad_() * 1  # a projector's
    newline = make(hidden).requires_grad_()
    embeds = make(len(sizes), length, hidden).requires_grad_()
    place = torch.arange(length, device=device) - TEXT // 2
    mask = torch.stack([(place >= 0) & (place < count) for count in made.counts])
    host_sizes = torch.tensor(sizes)

    def before() -> Tensor:
        images, _ = pack(features.split(tiles), host_sizes, image_newline=newline)
        return embeds.masked_scatter(mask.unsqueeze(-1), torch.cat(images))

    def after(made: Plan = made) -> Tensor:
        packed = pack_tiles(concatenated(features.split(tiles)), newline, made)
        return ops.merge_image_tokens(embeds, packed, mask)

    def at_once(made: Plan = made) -> Tensor:
        source, target = made.tables
        return ops.anyres_merge(embeds, features, newline, source, target, mask)

    called: dict[str, Callable[[], Tensor]] = {"before": before, "after": after}
    if not made.is_resized:
        called["at once"] = at_once
    yield Part(f"{name}, forward", without_gradients(called))
    upstream, wanted = torch.randn_like(embeds), (embeds, features, newline)
    known = [*wanted, mask, *made.tables]
    steps = with_gradients(called, wanted, upstream)
    yield Part(f"{name}, forward and backward", steps, known)


PARTS = (llava_next, llava_onevision)


def main(**options: Any) -> dict[str, Any]:
    """See `before_and_after.measure`; in bf16."""
    return measure("AnyRes", PARTS, dtype=torch.bfloat16, **options)
