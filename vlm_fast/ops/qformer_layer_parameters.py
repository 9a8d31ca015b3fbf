"""The parameters of a Q-Former's layer, as `qformer_layer` takes them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from vlm_fast.ops.argument_errors import wrong_value

SELF, CROSS, MLP = 10, 6, 6  # the number of parameters of each block


class Blocks(NamedTuple):
    """A fact about each block of a layer; () for a block that it lacks.

    Attributes:
        first: the self-attention of all tokens.
        cross: the attention of the queries to the image.
        queries, text: the MLPs of the query and of the text tokens.
    """

    first: Any
    cross: Any = ()
    queries: Any = ()
    text: Any = ()


def split(parameters: Any, has_image: bool, has_queries: bool) -> tuple[Any, Any, Any, Any]:
    """The slices, in the order of `Blocks`, of a sequence with an element for each parameter."""
    cross = SELF + CROSS * has_image
    text = cross + MLP * has_queries
    return parameters[:SELF], parameters[SELF:cross], parameters[cross:text], parameters[text:]


def parameter_shapes(width: int, inner: Blocks) -> list[tuple[int, ...]]:
    """The shape of each parameter.

    ``inner``: for each block () if the layer lacks it; for MLPs the width between their linears.
    """
    square, vector = (width, width), (width,)
    first = (square, square, square, vector, vector, vector, square, vector, vector, vector)
    cross = (square, vector, square, vector, vector, vector) if inner.cross != () else ()
    mlps: list[tuple[int, ...]] = []
    for size in (inner.queries, inner.text):
        if size != ():
            mlps += [(size, width), (size,), (width, size), vector, vector, vector]
    return [*first, *cross, *mlps]


def check(
    hidden: Tensor, image_kv: Tensor | None, parameters: list[Tensor], *others: Any,
    text: int, **options: Any,
) -> ValueError | None:  # fmt: skip
    """What is wrong with the number or the shapes of the parameters, or None."""
    width, queries = hidden.shape[2], hidden.shape[1] - text
    mlps = (queries > 0) + (text > 0)
    count = SELF + MLP * mlps + (0 if image_kv is None else CROSS)
    if len(parameters) != count:
        wanted = f"{count} {'without' if image_kv is None else 'with'} an image, {mlps} MLPs"
        return wrong_value("qformer_layer", "the length of parameters", len(parameters), wanted)
    found = split(parameters, image_kv is not None, queries > 0)
    inner = [(mlp[0].shape[0] if mlp[0].ndim else 0) if mlp else () for mlp in found[2:]]
    shapes = parameter_shapes(width, Blocks((), () if image_kv is None else 0, *inner))
    for i, (parameter, shape) in enumerate(zip(parameters, shapes, strict=True)):
        if parameter.shape != shape:
            return wrong_value("qformer_layer", f"parameters[{i}]", parameter, f"{shape}")
    return None
