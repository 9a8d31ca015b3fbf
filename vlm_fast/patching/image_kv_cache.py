"""Cache of the keys and values of images during generation.

All tokens of one generation attend to the same images. transformers passes the same text cache from
one token to the next, so that object identifies the generation. The entry ends with that cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]


class ImageKeyValueCache:
    """Keys and values of the images of one generation, for each cross-attention layer."""

    def __init__(self) -> None:
        self._entries: dict[nn.Module, tuple[Tensor, Any, KeysValues]] = {}

    @classmethod
    def for_generation(cls, model: Any, cache: Any, tokens: int) -> ImageKeyValueCache | None:
        """The cache of a generation, or None if each call must project its images anew.

        A call with one token after cached ones continues a generation. Any other call starts a new
        one, because its images may be others.

        Args:
            model: the model that is called; nothing is cached in training mode.
            cache: transformers' cache of the keys and values of the text.
            tokens: the number of text tokens of this call.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or model.training:
            return None
        length = getattr(cache, "get_seq_length", int)()
        if type(length) is not int or type(cache).__weakrefoffset__ == 0:
            return None
        if length == 0 or tokens != 1 or cache not in _generations:
            _generations[cache] = cls()
        return _generations[cache]

    def get_or_project(
        self, layer: Any, images: Tensor, project: Callable[[Tensor], KeysValues]
    ) -> KeysValues:
        """``project(images)``, or its former result if the images are unchanged since then.

        Unchanged means the same memory, dtype, autocast mode and version counter. Tensors made in
        inference mode have no version counter: in-place writes to them are not noticed.
        """
        if type(images) is not Tensor or images.is_meta:
            return project(images)
        version = None if images.is_inference() else images._version
        dtype = torch.get_autocast_dtype(images.device.type)
        autocast = dtype if torch.is_autocast_enabled(images.device.type) else None
        state = (version, autocast, images.dtype, images.shape, images.stride())
        known = self._entries.get(layer)
        if known is None or known[1] != state or not _is_same_memory(known[0], images):
            # Keeping a reference to the images prevents that others reuse their memory.
            known = self._entries[layer] = (images, state, project(images))
        return known[2]


_generations: WeakKeyDictionary[Any, ImageKeyValueCache] = WeakKeyDictionary()


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.device == other.device
