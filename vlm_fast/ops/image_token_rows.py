"""Rows of image features and the placeholder positions that they belong to: counts and limits."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_fast.fallback import switches
from vlm_fast.kernels._launcher import is_traced, runs_triton

MAX_ROWS = 2**31 - 1  # row numbers are int32


def check_count(name: str, argument: str, count: int, found: Tensor | int | None) -> None:
    """Check that ``count`` rows meet as many true entries of image_mask.

    On the host if that costs no synchronisation or under `vlm_fast.strict`; otherwise with an
    assertion on the device. Nothing is checked while tracing, or of None.

    Raises:
        ValueError: The counts differ.
    """
    if found is None:
        return
    if isinstance(found, Tensor):
        if is_traced(found):
            return
        if found.is_cuda and not switches.strict:
            message = f"vlm_fast.{name}: {argument} has {count} rows, image_mask another count"
            torch._assert_async(found == count, message)
            return
    if int(found) != count:
        raise ValueError(
            f"vlm_fast.{name}: {argument} has {count} rows, "
            f"expected {int(found)}, the true entries of image_mask"
        )


def counts_before_launch(mask: Tensor) -> bool:
    """Whether the host counts the mask although a kernel will assert the count.

    It does so under `vlm_fast.strict`, for the error that it raises, and in Triton's interpreter.
    """
    return runs_triton(mask) and (switches.strict or not mask.is_cuda) and not is_traced(mask)


def why_not_merged(x: Tensor) -> str | None:
    """Why no kernel takes ``(batch, sequence, hidden)`` of this size, or None."""
    if x.shape[0] * x.shape[1] > MAX_ROWS:
        return f"more than {MAX_ROWS} rows"
    if x.numel() == 0:
        return "an empty sequence or hidden size"
    return None


def placeholders(batch: int, sequence: int, images: int, tokens: int) -> Tensor:
    """A mask ``(batch, sequence)`` for tests, with ``images`` runs of ``tokens`` in each sample.

    The runs are spread evenly, with text around them, at positions that differ between samples.
    """
    mask = torch.zeros(batch, sequence, dtype=torch.bool)
    spare = sequence - images * tokens
    for sample in range(batch):
        for image in range(images):
            text_before = min((spare * (image + 1) + sample) // (images + 1), spare)
            start = image * tokens + text_before
            mask[sample, start : start + tokens] = True
    return mask
