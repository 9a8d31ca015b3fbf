"""The result of a ``pack_image_features``: its form in each release, and its images as views."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlm_fast.patching.deferred_tensor import DeferredTensor


class PackedImage(DeferredTensor):
    """The rows of one image, a view of the rows of all images.

    ``torch.cat`` of the views of all images, in order, returns the tensor that they are views of.
    """

    all_rows: Tensor
    position: tuple[int, int]  # index of this image, number of images

    @classmethod
    def shortcut(cls, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is not torch.cat or kwargs.get("dim", 0) != 0 or len(args) != 1:
            return None
        parts = args[0]
        all_rows = getattr(parts[0], "all_rows", None)
        positions = [(i, len(parts)) for i in range(len(parts))]
        if all_rows is not None and all(
            getattr(part, "all_rows", None) is all_rows and part.position == position
            for part, position in zip(parts, positions, strict=True)
        ):
            return all_rows
        return None

    def to_plain_tensor(self) -> None:
        """Make this object itself a plain tensor, wherever it is stored."""
        del self.all_rows, self.position
        self.__class__ = Tensor  # type: ignore[assignment]


def split_images(whole: Tensor, counts: Sequence[int]) -> list[PackedImage]:
    """Views of the rows ``(rows, hidden)`` of all images, one for each image."""
    images: list[PackedImage] = []
    for i, start in enumerate(accumulate(counts[:-1], initial=0)):
        image = whole.narrow(0, start, counts[i]).as_subclass(PackedImage)
        image.all_rows, image.position = whole, (i, len(counts))
        images.append(image)
    return images


class PackResult(NamedTuple):
    """The form of what a ``pack_image_features`` returns; it differs between releases.

    Attributes:
        counts: whether it returns the number of rows of each image too.
        flat: whether an image of a single tile has one dimension.
    """

    counts: bool
    flat: bool


def why_not_packed(module: nn.Module) -> str | None:
    """Why the result of a model's own ``pack_image_features`` has no known form, or None."""
    try:
        probe_pack_method(type(module).pack_image_features)  # type: ignore[attr-defined]
    except Exception as error:  # an unknown method may raise anything
        return f"pack_image_features cannot be probed: {type(error).__name__}: {error}"
    return None


def probe_pack_method(method: Any) -> PackResult:
    """Call a ``pack_image_features`` with one tile of one row, to see the form of its result.

    Raises:
        ValueError: it returns a result of another form.
        Exception: whatever the method raises.
    """
    tile = torch.arange(2.0, device="cpu")
    known = {"vision_feature_select_strategy": "full"}
    named = {name: known[name] for name in inspect.signature(method).parameters if name in known}
    found = method(SimpleNamespace(), [tile.view(1, 1, 2)], [[1, 1]], **named)
    images, *counts = found if isinstance(found, tuple) else (found,)
    listed = type(images) is list and len(images) == 1
    for flat, image in ((False, tile[None]), (True, tile)):
        counted = [count.tolist() for count in counts] in ([], [[len(image)]])
        if listed and counted and torch.equal(images[0], image):
            return PackResult(bool(counts), flat)
    raise ValueError("it returns neither a list of images nor that and their rows")


def pack_options(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of ``pack_image_features`` behind the sizes, by name.

    Raises:
        TypeError: the method does not take them.
    """
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    others = [p for p in list(signature.parameters.values())[3:] if p.kind not in variadic]
    given = {p.name: value for p, value in zip(others, args, strict=False)}
    options = {**{p.name: p.default for p in others}, **given, **kwargs}
    absent = any(value is inspect.Parameter.empty for value in options.values())
    if max(len(args), len(options)) > len(others) or given.keys() & kwargs or absent:
        signature.bind(None, None, None, *args, **kwargs)
    return options
