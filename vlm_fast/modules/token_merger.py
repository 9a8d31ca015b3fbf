"""`TokenMerger`: Token Merging between a vision encoder and a projector."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.token_grid import mark_merged
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_value

OP = "TokenMerger"


class MergedTokens(NamedTuple):
    """The result of `TokenMerger.merge`.

    Attributes:
        tokens: ``(batch, n, features)``.
        size: ``(batch, n)``, how many input tokens each token is the mean of; None if each is one.
    """

    tokens: Tensor
    size: Tensor | None


class TokenMerger(nn.Module):
    """Token Merging (ToMe, arXiv 2210.09461): replace similar tokens by their mean.

    It has no parameters. Tokens are compared by cosine similarity. A round merges at most half of
    the tokens; further rounds follow until the wanted number is reached. The output order is that
    of `vlm_fast.ops.bipartite_match`: the remaining A tokens, then the B tokens. They form no grid
    any more, so pooling or shuffling a grid must come before; modules that need a grid raise.

    Args:
        ratio: factor by which tokens become fewer, rounded up; protected tokens do not count.
        keep: number of tokens left, including protected ones. Give either ratio or keep.
        protected: the first so many tokens (a CLS token, registers) are never merged.

    Raises:
        ValueError: not exactly one of ratio and keep, a ratio below 1, a negative ``protected``, or
            keep not above protected.
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
        """The number of tokens left of ``tokens``."""
        if self.keep is not None or self.ratio is None:
            return min(tokens, self.keep or 0)
        return self.protected + math.ceil((tokens - self.protected) / self.ratio)

    def forward(
        self, x: Tensor, metric: Tensor | None = None, size: Tensor | None = None
    ) -> Tensor:
        """The tokens ``(batch, kept, features)`` of `merge`, which explains the arguments.

        Raises:
            TypeError, ValueError: as `merge`.
        """
        return self.merge(x, metric, size).tokens

    def merge(
        self, x: Tensor, metric: Tensor | None = None, size: Tensor | None = None
    ) -> MergedTokens:
        """Merge tokens; the result has ``(batch, kept, features)`` and the size of each token.

        Args:
            x: ``(batch, tokens, features)``.
            metric: ``(batch, tokens, any)``, the vectors by which tokens are compared; x by
                default. The paper takes the keys of attention, averaged over heads. No gradient.
            size: ``(batch, tokens)``, how many tokens each is the mean of already; None means 1.

        Raises:
            TypeError, ValueError: as `vlm_fast.ops.bipartite_match` and `merge_tokens`; or x has
                fewer tokens than are protected.
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
    """``log(size)`` as the ``bias`` of attention: proportional attention of Token Merging.

    A key that is the mean of n tokens then counts n times (arXiv 2210.09461, section 3).
    `vlm_fast.ops.cross_attention` and ``self_attention`` read one number per key; no matrix of
    scores is formed. The sizes get no gradient.

    Args:
        size: ``(batch, tokens)``, as `vlm_fast.ops.merge_tokens` returns it.

    Returns:
        ``(batch, 1, 1, tokens)``.
    """
    return size.detach().log().unsqueeze(1).unsqueeze(1)
