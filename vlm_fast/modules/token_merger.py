"""Fewer tokens between a tower and a projector: those that are alike become their mean."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.token_grid import mark_merged
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_value

OP = "TokenMerger"


class MergedTokens(NamedTuple):
    """Tokens ``(batch, n, features)``, and ``(batch, n)`` how many each of them stands for."""

    tokens: Tensor
    size: Tensor | None  # None where each stands for itself


class TokenMerger(nn.Module):
    """Token Merging (arXiv 2210.09461) to a fixed number of tokens; it has no parameters.

    A round merges at most half of the tokens; as many follow one another as are needed. Tokens are
    compared by the cosine of themselves, or of a metric.

    Args:
        ratio: how many times fewer tokens, rounded up; protected tokens do not count.
        keep: how many tokens are left, protected ones among them. One of ratio and keep.
        protected: so many first tokens (a CLS token, registers) are never merged.

    What stands between rounds, and after the last: A tokens that are left, then B tokens, as
    `vlm_fast.ops.bipartite_match` says. They are no grid any more: what pools or shuffles a grid
    comes before, and refuses them where they reach it as they are.

    Raises:
        ValueError: not one of ratio and keep, a ratio below 1, or keep not above protected.
    """

    def __init__(
        self, ratio: float | None = None, *, keep: int | None = None, protected: int = 0
    ) -> None:
        super().__init__()
        if (ratio is None) == (keep is None):
            raise wrong_value(OP, "ratio, keep", (ratio, keep), "one of the two")
        if ratio is not None and not 1 <= ratio < math.inf:
            raise wrong_value(OP, "ratio", ratio, "1 or more")
        if protected < 0:
            raise wrong_value(OP, "protected", protected, "0 or more")
        if keep is not None and keep <= protected:
            raise wrong_value(OP, "keep", keep, f"more than the {protected} protected tokens")
        self.ratio, self.keep, self.protected = ratio, keep, protected

    def extra_repr(self) -> str:
        amount = f"ratio={self.ratio}" if self.keep is None else f"keep={self.keep}"
        return f"{amount}, protected={self.protected}"

    def kept(self, tokens: int) -> int:
        """How many of so many tokens are left."""
        if self.keep is not None or self.ratio is None:
            return min(tokens, self.keep or 0)
        return self.protected + math.ceil((tokens - self.protected) / self.ratio)

    def forward(
        self, x: Tensor, metric: Tensor | None = None, size: Tensor | None = None
    ) -> Tensor:
        """The tokens of `merge` alone."""
        return self.merge(x, metric, size).tokens

    def merge(
        self, x: Tensor, metric: Tensor | None = None, size: Tensor | None = None
    ) -> MergedTokens:
        """``(batch, kept, features)`` and the sizes of these tokens.

        Args:
            x: ``(batch, tokens, features)``.
            metric: ``(batch, tokens, any)``, what tokens are compared by (the paper takes the keys
                of attention, averaged over heads); x itself by default. It gets no gradient.
            size: ``(batch, tokens)``, what each token stands for already; None is 1 for each.

        Raises:
            TypeError, ValueError: as the ops; or there are fewer tokens than protected ones.
        """
        for name, value in (("x", x), ("metric", metric)):
            if not isinstance(value, Tensor) and not (value is None and name == "metric"):
                raise not_a_tensor(OP, name, value)
        if x.ndim != 3 or x.shape[1] < self.protected:
            raise wrong_value(OP, "x", x, f"(batch, {self.protected} tokens or more, features)")
        if metric is not None and metric.shape[:2] != x.shape[:2]:
            wanted = f"({x.shape[0]}, {x.shape[1]}, any), one for each token"
            raise wrong_value(OP, "metric", metric, wanted)
        metric = None if metric is None else metric.detach()
        kept = self.kept(x.shape[1])
        while x.shape[1] > kept:
            by = x if metric is None else metric
            match = ops.bipartite_match(by, r=x.shape[1] - kept, protected=self.protected)
            if metric is not None:
                metric = ops.merge_tokens(metric, match, size)[0]
            x, size = ops.merge_tokens(x, match, size)
            mark_merged(x)
        return MergedTokens(x, size)


def proportional_bias(size: Tensor) -> Tensor:
    """``log(size)`` for the ``bias`` of attention: a token counts for as many as it stands for.

    The proportional attention of Token Merging (arXiv 2210.09461, section 3). One number a key, for
    all heads and queries: `vlm_fast.ops.cross_attention` and ``self_attention`` read it as it is,
    and no score is formed in memory for it. It is a constant: no gradient goes to the sizes.

    Args:
        size: ``(batch, tokens)``, as `vlm_fast.ops.merge_tokens` returns it.

    Returns ``(batch, 1, 1, tokens)``.
    """
    return size.detach().log().unsqueeze(1).unsqueeze(1)
