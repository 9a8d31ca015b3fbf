"""What a class's ``get_placeholder_mask`` gives and counts, read by asking it.

Every release words this method anew, but what it gives is nearly always the same: for each kind of
placeholder the places where ``input_ids`` is one id, which must be as many as there are features.
So the method is asked about ids of our own, and its answers must match a `MaskSpec`. Its
source is not needed.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class MaskSpec(NamedTuple):
    """The answers of a ``get_placeholder_mask(input_ids, inputs_embeds, *arguments)``.

    Attributes:
        arguments: the names of its further arguments, in order.
        ids: for each mask the attributes that lead from the model to its id, as ``("config",
            "image_token_id")``, or ``(name,)`` of an argument that is the id itself.
        counted: each argument of features, and which mask must have as many rows.
        expanded: whether masks are ``(batch, sequence, hidden)``, not ``(batch, sequence, 1)``.
    """

    arguments: tuple[str, ...]
    ids: tuple[tuple[str, ...], ...]
    counted: tuple[tuple[str, int], ...]
    expanded: bool

    def masks(
        self, model: Any, input_ids: Tensor, inputs_embeds: Tensor, given: dict[str, Any]
    ) -> list[Tensor]:
        """The masks that the method gives. Ids are read at every call, for a config may change."""
        masks = []
        for path in self.ids:
            number = given[path[0]] if path[0] in given else _at(model, path)
            mask = (input_ids == number).unsqueeze(-1)
            if mask.device != inputs_embeds.device:
                mask = mask.to(inputs_embeds.device)
            masks.append(mask.expand_as(inputs_embeds) if self.expanded else mask)
        return masks


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = getattr(value, name)
    return value


class UnknownMaskMethod(Exception):
    """Why a method has no `MaskSpec`, to be read after its name."""


# What these name moves nothing along a sequence: an answer about two rows of ids holds for all.
_NAMES = {
    "config", "vocabulary_mapping", "image_token_id", "video_token_id", "audio_token_id",
    "get_input_embeddings", "torch", "full", "tensor", "long", "dtype", "device", "all", "sum",
    "unsqueeze", "expand_as", "to", "shape", "size", "numel", "flatten", "torch_compilable_check",
    "ValueError",
}  # fmt: skip


def read(method: Any) -> MaskSpec:
    """The form of a ``get_placeholder_mask``.

    Raises:
        UnknownMaskMethod: it has none, or it does something that is not known here.
        Exception: whatever the method raises that is asked.
    """
    features, tokens = _arguments(method.__code__)
    if tokens and method.__defaults__:
        raise UnknownMaskMethod(f"need not be given {tokens[0]}")
    numbers = _Numbers()
    token = {name: getattr(numbers, name) for name in tokens}
    ids, embeds = _sample()

    def ask(**rows: int) -> list[Any] | None:
        """Its masks for twice so many rows of features, or None where it raises a ValueError."""
        given: dict[str, Any] = dict.fromkeys(features) | token
        given |= {name: embeds.new_zeros(2, n, embeds.shape[-1]) for name, n in rows.items()}
        try:
            answer = method(numbers, ids, embeds, **given)
        except ValueError:
            return None
        return list(answer) if isinstance(answer, tuple) and len(answer) > 1 else [answer]

    with _checks_turned_on():
        counts = {name: _counted(name, ask) for name in features}
        answers = [ask(**{name: count}) for name, count in counts.items()] + [ask(**counts)]
    masks = answers[-1]
    if masks is None:
        raise UnknownMaskMethod("takes features only alone")
    if len(numbers.found) > _MOST:
        raise UnknownMaskMethod(f"asks for more than {_MOST} ids")
    paths = {number: path for path, number in numbers.found.items()}
    found = [_number(mask, ids, paths) for mask in masks]
    counted = []
    for place, (name, count) in enumerate(counts.items()):
        places = [i for i, number in enumerate(found) if int((ids[0] == number).sum()) == count]
        if not places:
            raise UnknownMaskMethod(f"gives no mask for {name}")
        counted.append((name, place if place in places else places[0]))
    expanded = masks[0].shape[-1] == embeds.shape[-1]
    form = MaskSpec((*features, *tokens), tuple(paths[n] for n in found), tuple(counted), expanded)
    expected = form.masks(numbers, ids, embeds, token)
    for answer in answers:
        if answer is None or len(answer) != len(expected) or not all(map(_same, answer, expected)):
            raise UnknownMaskMethod("gives other masks for other features")
    return form


def _arguments(code: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The arguments that are features, and the one that is an id, if any."""
    unknown = sorted(set(code.co_names) - _NAMES)
    if unknown:
        raise UnknownMaskMethod(f"uses {', '.join(unknown)}")
    if code.co_freevars or any(inspect.iscode(constant) for constant in code.co_consts):
        raise UnknownMaskMethod("has functions inside")
    named = code.co_varnames[1 : code.co_argcount]
    features = tuple(name for name in named[2:] if name.endswith("features"))
    tokens = tuple(name for name in named[2:] if name.endswith("token_id"))
    more = code.co_kwonlyargcount or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    known = named == ("input_ids", "inputs_embeds", *features, *tokens) and len(tokens) <= 1
    if not features or not known or more:
        raise UnknownMaskMethod(f"takes {', '.join(named)}{' and more' if more else ''}")
    return features, tokens


class _Numbers:
    """Stands in for a model: every id that it is asked for is a number of its own."""

    def __init__(self, found: dict[tuple[str, ...], int] | None = None, *path: str) -> None:
        self.found = {} if found is None else found
        self.path = path

    def __getattr__(self, name: str) -> Any:
        path = (*self.path, name)
        if not name.endswith("token_id"):
            return _Numbers(self.found, *path)
        return self.found.setdefault(path, _FIRST + _STEP * len(self.found))


_FIRST, _STEP, _MOST = 1000, 10, 4


def _sample() -> tuple[Tensor, Tensor]:
    """Ids and embeds of two rows: the i-th number i + 1 times, among its neighbours and others."""
    row = [0, 1, -1, -100]
    for i in range(_MOST):
        number = _FIRST + _STEP * i
        row += [number] * (i + 1) + [number - 1, number + 1]
    shuffled = [row[7 * k % len(row)] for k in range(len(row))]
    ids = torch.tensor([shuffled, row], device="cpu")
    return ids, torch.zeros(*ids.shape, 2, device="cpu")


def _counted(name: str, ask: Any) -> int:
    """How many of a number there are in a row, if so many features are taken and no others."""
    taken = [rows for rows in range(_MOST + 2) if ask(**{name: rows}) is not None]
    if len(taken) > 1:
        raise UnknownMaskMethod(f"does not count {name}")
    if not taken:
        raise UnknownMaskMethod(f"takes no {name} alone")
    return taken[0]


def _number(mask: Any, ids: Tensor, numbers: Any) -> int:
    """The id whose places a mask has."""
    if type(mask) is not Tensor or mask.shape[:-1] != ids.shape or mask.shape[-1] not in (1, 2):
        raise UnknownMaskMethod("gives no masks of rows")
    same = [n for n in numbers if mask.dtype == torch.bool and torch.equal(ids == n, mask[..., 0])]
    if len(same) != 1:
        raise UnknownMaskMethod("gives masks that are not those of one id")
    return same[0]


def _same(mask: Any, expected: Tensor) -> bool:
    return type(mask) is Tensor and mask.shape == expected.shape and torch.equal(mask, expected)


@contextlib.contextmanager
def _checks_turned_on() -> Iterator[None]:
    """Without the variable by which transformers leaves out its checks."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
