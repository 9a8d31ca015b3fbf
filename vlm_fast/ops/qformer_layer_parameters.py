"""The parameters of a Q-Former's layer, as `qformer_layer` takes them."""

from __future__ import annotations

SELF, CROSS, MLP = 10, 6, 6  # the number of parameters of each block


def parameter_shapes(width: int, inner: int, has_image: bool) -> list[tuple[int, ...]]:
    """The shape of each parameter; ``inner`` is the width between the MLP's linears."""
    square, vector = (width, width), (width,)
    first = (square, square, square, vector, vector, vector, square, vector, vector, vector)
    cross = (square, vector, square, vector, vector, vector) if has_image else ()
    return [*first, *cross, (inner, width), (inner,), (width, inner), vector, vector, vector]
