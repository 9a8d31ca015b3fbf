"""A photograph, and what the image processors of transformers make of it."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn


def load() -> tuple[Any, str]:
    """Return a photograph as an array of bytes, (height, width, 3), and its name.

    scikit-image and matplotlib ship one. Without both it is smooth noise, and the name says so.
    """
    if importlib.util.find_spec("skimage"):
        from skimage import data

        return data.astronaut(), "astronaut.png of scikit-image"
    if importlib.util.find_spec("matplotlib") and importlib.util.find_spec("PIL"):
        from matplotlib import cbook
        from numpy import asarray
        from PIL import Image

        with cbook.get_sample_data("grace_hopper.jpg") as file:
            return asarray(Image.open(file).convert("RGB")), "grace_hopper.jpg of matplotlib"
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 32, 32, generator=generator)
    picture = nn.functional.interpolate(coarse, (512, 512), mode="bicubic").clamp(0, 1)
    name = "smooth noise (install scikit-image for a photograph)"
    return (picture[0].permute(1, 2, 0) * 255).byte().numpy(), name


def preprocessed(family: str, processor: str, *, side: int = 0, **settings: Any) -> tuple[Any, str]:
    """Preprocess the photograph with an image processor of transformers.

    Args:
        family: folder of the model in transformers.
        processor: class name of an image processor that needs Pillow and not torchvision.
        side: resize the photograph to this many pixels first; 0 leaves it.
        **settings: arguments of the processor.

    Returns:
        The processor's dictionary of tensors, which is empty without Pillow, and a description of
        the photograph and the processor.
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
    """Return the photograph as (1, 3, side, side), resized and normalised by torch."""
    picture, _ = load()
    values = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    values = nn.functional.interpolate(values, (side, side), mode="bicubic", antialias=True)
    return (values - 0.5) / 0.5
