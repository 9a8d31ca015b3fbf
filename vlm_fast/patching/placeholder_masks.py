"""What the ``get_placeholder_mask`` of a transformers model returns, found by calling it.

Each release words this method differently, but nearly always it returns, for each kind of
placeholder, the positions where ``input_ids`` equals one token id. Their number must be that of the
features. `probe_mask_method` calls the method with made-up ids and compares its results with those
of a `MaskSpec`. The source of the method is not needed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class MaskSpec(NamedTuple):
    """The results of a ``get_placeholder_mask(input_ids, inputs_embeds, *arguments)``.

    Attributes:
        arguments: names of the further arguments, in order.
        id_paths: for each mask the attribute path from the model to its token id, such as
            ``("config", "image_token_id")``, or ``(name,)`` of an argument that is the id.
        counted_features: for each argument with features, its name and the index of the mask that
            must have as many positions as there are features.
        expanded: whether masks are ``(batch, sequence, hidden)``, not ``(batch, sequence, 1)``.
    """

    arguments: tuple[str, ...]
    id_paths: tuple[tuple[str, ...], ...]
    counted_features: tuple[tuple[str, int], ...]
    expanded: bool

    def make_masks(
        self, model: Any, input_ids: Tensor, inputs_embeds: Tensor, given: dict[str, Any]
    ) -> list[Tensor]:
        """The masks that the method would return.

        Token ids are read from the model at every call, because its config may change. ``given``:
        the further arguments by name.
        """
        masks = []
        for path in self.id_paths:
            token_id = (
                given[path[0]] if path[0] in given else functools.reduce(getattr, path, model)
            )
            mask = (input_ids == token_id).unsqueeze(-1)
            if mask.device != inputs_embeds.device:
                mask = mask.to(inputs_embeds.device)
            masks.append(mask.expand_as(inputs_embeds) if self.expanded else mask)
        return masks


class UnknownMaskMethod(Exception):
    """A method has no `MaskSpec`. The message says why and is meant to follow its name."""


# Functions and attributes that do not mix positions of a sequence: if the results for the two rows
# of `_probe_inputs` are as expected, they are for all rows.
_ALLOWED_NAMES = {
    "config", "vocabulary_mapping", "image_token_id", "video_token_id", "audio_token_id",
    "get_input_embeddings", "torch", "full", "tensor", "long", "dtype", "device", "all", "sum",
    "unsqueeze", "expand_as", "to", "shape", "size", "numel", "flatten", "torch_compilable_check",
    "ValueError",
}  # fmt: skip
# `_FakeModel` numbers its token ids from _FIRST_ID in steps of _STEP; at most _MAX_IDS of them.
_FIRST_ID, _STEP, _MAX_IDS = 1000, 10, 4


def probe_mask_method(method: Any) -> MaskSpec:
    """The `MaskSpec` of a ``get_placeholder_mask``.

    Raises:
        UnknownMaskMethod: it has none, or it uses something that is not known here.
        Exception: whatever the method itself raises.
    """
    features, tokens = _argument_names(method.__code__)
    if tokens and method.__defaults__:
        raise UnknownMaskMethod(f"need not be given {tokens[0]}")
    model = _FakeModel()
    token = {name: getattr(model, name) for name in tokens}
    ids, embeds = _probe_inputs()

    def call(**counts: int) -> list[Any] | None:
        """The masks for two rows of so many features each; None if it raises a ValueError."""
        given: dict[str, Any] = dict.fromkeys(features) | token
        given |= {name: embeds.new_zeros(2, n, embeds.shape[-1]) for name, n in counts.items()}
        try:
            result = method(model, ids, embeds, **given)
        except ValueError:
            return None
        return list(result) if isinstance(result, tuple) and len(result) > 1 else [result]

    with _transformers_checks_enabled():
        counts = {name: _accepted_count(name, call) for name in features}
        results = [call(**{name: count}) for name, count in counts.items()] + [call(**counts)]
    masks = results[-1]
    if masks is None:
        raise UnknownMaskMethod("takes one kind of features at a time only")
    if len(model.ids) > _MAX_IDS:
        raise UnknownMaskMethod(f"asks for more than {_MAX_IDS} ids")
    paths = {token_id: path for path, token_id in model.ids.items()}
    found = [_token_id_of(mask, ids, paths) for mask in masks]
    counted = []
    for place, (name, count) in enumerate(counts.items()):
        places = [i for i, number in enumerate(found) if int((ids[0] == number).sum()) == count]
        if not places:
            raise UnknownMaskMethod(f"gives no mask for {name}")
        counted.append((name, place if place in places else places[0]))
    expanded = masks[0].shape[-1] == embeds.shape[-1]
    id_paths = tuple(paths[number] for number in found)
    spec = MaskSpec((*features, *tokens), id_paths, tuple(counted), expanded)
    expected = spec.make_masks(model, ids, embeds, token)
    for result in results:
        if result is None or len(result) != len(expected) or not all(map(_same, result, expected)):
            raise UnknownMaskMethod("gives other masks for other features")
    return spec


def _argument_names(code: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the arguments with features, and of the argument that is a token id, if any."""
    unknown = sorted(set(code.co_names) - _ALLOWED_NAMES)
    if unknown:
        raise UnknownMaskMethod(f"uses {', '.join(unknown)}")
    if code.co_freevars or any(inspect.iscode(constant) for constant in code.co_consts):
        raise UnknownMaskMethod("has functions inside")
    names = code.co_varnames[1 : code.co_argcount]
    features = tuple(name for name in names[2:] if name.endswith("features"))
    tokens = tuple(name for name in names[2:] if name.endswith("token_id"))
    more = code.co_kwonlyargcount or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    known = names == ("input_ids", "inputs_embeds", *features, *tokens) and len(tokens) <= 1
    if not features or not known or more:
        raise UnknownMaskMethod(f"takes {', '.join(names)}{' and more' if more else ''}")
    return features, tokens


class _FakeModel:
    """A model and config for the probe: each ``...token_id`` that is read is a new number.

    Attributes:
        ids: the number of each attribute path that has been read.
        path: the attribute path from the model to this object.
    """

    def __init__(self, ids: dict[tuple[str, ...], int] | None = None, *path: str) -> None:
        self.ids = {} if ids is None else ids
        self.path = path

    def __getattr__(self, name: str) -> Any:
        path = (*self.path, name)
        if not name.endswith("token_id"):
            return _FakeModel(self.ids, *path)
        return self.ids.setdefault(path, _FIRST_ID + _STEP * len(self.ids))


def _probe_inputs() -> tuple[Tensor, Tensor]:
    """Token ids ``(2, tokens)`` and embeddings ``(2, tokens, 2)``.

    Each row holds the i-th id of `_FakeModel` i + 1 times, next to its neighbours and other ids.
    """
    row = [0, 1, -1, -100]
    for i in range(_MAX_IDS):
        token_id = _FIRST_ID + _STEP * i
        row += [token_id] * (i + 1) + [token_id - 1, token_id + 1]
    shuffled = [row[7 * k % len(row)] for k in range(len(row))]
    ids = torch.tensor([shuffled, row], device="cpu")
    return ids, torch.zeros(*ids.shape, 2, device="cpu")


def _accepted_count(name: str, call: Callable[..., Any]) -> int:
    """The only number of features per row that the method accepts for this argument."""
    accepted = [count for count in range(_MAX_IDS + 2) if call(**{name: count}) is not None]
    if len(accepted) > 1:
        raise UnknownMaskMethod(f"does not count {name}")
    if not accepted:
        raise UnknownMaskMethod(f"takes no {name} without others")
    return accepted[0]


def _token_id_of(mask: Any, ids: Tensor, token_ids: Any) -> int:
    """The one token id whose positions are those of the mask."""
    if type(mask) is not Tensor or mask.shape[:-1] != ids.shape or mask.shape[-1] not in (1, 2):
        raise UnknownMaskMethod("gives no masks of rows")
    same = [
        n for n in token_ids if mask.dtype == torch.bool and torch.equal(ids == n, mask[..., 0])
    ]
    if len(same) != 1:
        raise UnknownMaskMethod("gives masks that are not those of one id")
    return same[0]


def _same(mask: Any, expected: Tensor) -> bool:
    return type(mask) is Tensor and mask.shape == expected.shape and torch.equal(mask, expected)


@contextlib.contextmanager
def _transformers_checks_enabled() -> Iterator[None]:
    """Unset the environment variable that turns off the checks of transformers."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
