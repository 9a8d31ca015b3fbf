"""Keys and values of images, kept beside the cache of one generation.

A generated token attends to the same images as the one before. The cache that a model passes from
token to token says that two calls belong to one generation; nothing outlives it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]


class ImageKeyValueCache:
    """Keys and values of the images of one generation, for each layer that reads them."""

    def __init__(self) -> None:
        self._of_layer: dict[nn.Module, tuple[Tensor, Any, KeysValues]] = {}

    @classmethod
    def for_generation(cls, model: Any, cache: Any, tokens: int) -> ImageKeyValueCache | None:
        """Those of a generation, or None where each call projects its images anew.

        A call of one token behind others goes on with a generation; any other call begins one, as
        its images may be others. ``cache``: the keys and values of the text, as transformers passes
        them on; ``tokens``: how many this call adds.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or model.training:
            return None
        length = getattr(cache, "get_seq_length", int)()
        if type(length) is not int or type(cache).__weakrefoffset__ == 0:
            return None
        if length == 0 or tokens != 1 or cache not in _kept:
            _kept[cache] = cls()
        return _kept[cache]

    def get_or_project(
        self, layer: Any, images: Tensor, project: Callable[[Tensor], KeysValues]
    ) -> KeysValues:
        """``project(images)``, or what it gave when this generation last read these images.

        Images that were written to since, or that lie elsewhere, are projected anew. Of tensors
        that were made in inference mode writes leave no trace; those are taken as unwritten while
        a generation lasts.
        """
        if type(images) is not Tensor or images.is_meta:
            return project(images)
        version = None if images.is_inference() else images._version
        dtype = torch.get_autocast_dtype(images.device.type)
        autocast = dtype if torch.is_autocast_enabled(images.device.type) else None
        state = (version, autocast, images.dtype, images.shape, images.stride())
        known = self._of_layer.get(layer)
        if known is None or known[1] != state or not _is_same_memory(known[0], images):
            # The images are held, so that no others can take their place in memory.
            known = self._of_layer[layer] = (images, state, project(images))
        return known[2]


_kept: WeakKeyDictionary[Any, ImageKeyValueCache] = WeakKeyDictionary()


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.device == other.device
