"""A photograph, as the image processors of transformers prepare it."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn


def load() -> tuple[Any, str]:
    """A picture as (height, width, 3) bytes, and what it is."""
    if importlib.util.find_spec("skimage"):
        from skimage import data

        return data.astronaut(), "astronaut.png of scikit-image"
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 32, 32, generator=generator)
    picture = nn.functional.interpolate(coarse, (512, 512), mode="bicubic").clamp(0, 1)
    return (picture[0].permute(1, 2, 0) * 255).byte().numpy(), "smooth noise: no scikit-image here"


def preprocessed(family: str, processor: str, *, side: int = 0, **settings: Any) -> tuple[Any, str]:
    """What a processor of transformers, one that needs Pillow alone, makes of the photograph.

    With ``side`` the photograph is enlarged to that many pixels before. Returns the processor's
    dictionary of tensors, and what they are of and by what. Without Pillow the dictionary is empty.
    """
    picture, what = load()
    if importlib.util.find_spec("PIL") is None:
        return {}, f"{what}, by torch: no Pillow here"
    if side:
        from PIL import Image

        picture = Image.fromarray(picture).resize((side, side))
        what = f"{what}, enlarged to {side} pixels"
    home = f"transformers.models.{family}.image_processing_pil_{family}"
    made = getattr(importlib.import_module(home), processor)(**settings)
    return made([picture], return_tensors="pt"), f"{what}, by {processor}"


def resized(side: int) -> Tensor:
    """``(1, 3, side, side)``, resized and normalised by torch."""
    picture, _ = load()
    values = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    values = nn.functional.interpolate(values, (side, side), mode="bicubic", antialias=True)
    return (values - 0.5) / 0.5
