"""The merge of image features into a prompt.

``before`` is ``masked_scatter`` with the mask that transformers makes, ``after`` is
`vlm_fast.ops.merge_image_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlm_fast import ops
from vlm_fast.benchmarks.before_and_after import Part, measure, with_gradients, without_gradients

IMAGE_TOKENS = 576
# (batch, sequence, hidden); each row has an image.
SHAPES = ((4, 2048, 4096), (2, 2048, 1024))


def merges(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Part]:
    for batch, sequence, hidden in SHAPES[1:] if quick else SHAPES:
        mask = torch.zeros(batch, sequence, dtype=torch.bool, device=device)
        mask[:, 5 : 5 + IMAGE_TOKENS] = True
        make = partial(torch.randn, device=device, dtype=dtype)
        embeds = make(batch, sequence, hidden).requires_grad_()
        features = make(batch, IMAGE_TOKENS, hidden).requires_grad_()
        upstream, known = torch.randn_like(embeds), [embeds, features, mask]
        called: dict[str, Callable[[], Tensor]] = {
            "before": partial(_masked_scatter, embeds, features, mask),
            "after": partial(ops.merge_image_tokens, embeds, features, mask),
        }
        shape = f"{batch} x {sequence} x {hidden}"
        yield Part(f"{shape}, forward", without_gradients(called))
        steps = with_gradients(called, (embeds, features), upstream)
        yield Part(f"{shape}, forward+backward", steps, known)


def _masked_scatter(embeds: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    return embeds.masked_scatter(mask.unsqueeze(-1), features)


PARTS = (merges,)


def main(**options: Any) -> dict[str, Any]:
    """See `before_and_after.measure`."""
    return measure("Merge", PARTS, **options)
