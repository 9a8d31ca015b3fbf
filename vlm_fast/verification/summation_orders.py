"""Run plain PyTorch with sums in random order, to estimate the size of its rounding error.

One run of plain PyTorch shows one sample of its rounding error, which depends on the processor:
vector width and the blocking of matrix products decide the order of each sum. If a result has few
numbers, or if its terms nearly cancel, one sample can be almost zero by chance. Several orders show
the usual size of the error on any machine.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ORDERS = 16
MOVED = 1 / 16

R = TypeVar("R")
Order = Callable[[int], Tensor]


class ReorderedRuns(Generic[R]):
    """An iterable of a function's results with its sums in random orders, computed lazily.

    The results of the functions in ``rounding`` come first. They compute the same as ``run`` by
    formulas that round differently. Then follow `ORDERS` random orders of each function. Results
    are cached.
    """

    def __init__(self, run: Callable[[], R], *rounding: Callable[[], R]) -> None:
        self._drawn: list[R] = []
        self._rest = self._draw((run, *rounding))

    def __iter__(self) -> Iterator[R]:
        yield from self._drawn
        for result in self._rest:
            self._drawn.append(result)
            yield result

    @staticmethod
    def _draw(runs: Sequence[Callable[[], R]]) -> Iterator[R]:
        for run in runs[1:]:
            yield run()
        for seed, run in itertools.product(range(ORDERS), runs):
            with RandomSumOrder(seed):
                result = run()
            yield result


class RandomSumOrder(TorchDispatchMode):
    """A dispatch mode that takes every sum inside in a random order given by ``seed``.

    These are the sums in matrix products, reductions, norms and softmax, and in their backward.
    Results differ from the usual ones by rounding. In 16 bits the order hardly matters, because
    sums are accumulated in float32 and rounded once. Therefore a share `MOVED` of the elements of
    16-bit operands that were computed inside is replaced by a neighbouring number, which has nearly
    the variance of rounding them. The random state of torch is not changed.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.computed: set[int] = set()  # data pointers of storages with rounded results

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = [_storage(t) for t in tree_leaves(args) if isinstance(t, Tensor)]
        reordered = None if types else _REORDERED.get(function)  # tensor subclasses are passed on
        if reordered is None:
            result = function(*args, **kwargs)
        else:
            order = functools.partial(self._order, device=_device(args))
            moved = tree_map_only(Tensor, self._rounded_otherwise, args)
            result = reordered(order, function, *moved, **kwargs)
        rounds = reordered is not None or torch.Tag.pointwise in function.tags
        rounds |= not self.computed.isdisjoint(operands)
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and rounds:
                self.computed.add(_storage(t))
            elif isinstance(t, Tensor) and _storage(t) not in operands:
                # the address belonged to a tensor that was freed
                self.computed.discard(_storage(t))
        return result

    def _order(self, n: int, *, device: torch.device) -> Tensor:
        return torch.randperm(n, generator=self.generator).to(device)

    def _rounded_otherwise(self, t: Tensor) -> Tensor:
        if t.dtype not in (torch.bfloat16, torch.float16) or _storage(t) not in self.computed:
            return t
        drawn = torch.rand(t.shape, generator=self.generator).to(t.device)
        step = (drawn < MOVED / 2).short() - (drawn >= 1 - MOVED / 2).short()
        moved = (t.view(torch.int16) + step).view(t.dtype)
        return torch.where(moved.isfinite() & t.isfinite() & (t != 0), moved, t)


def _storage(t: Tensor) -> int:
    known = type(t) in (Tensor, torch.nn.Parameter) and t.layout is torch.strided
    return t.untyped_storage().data_ptr() if known else 0


def _device(args: tuple[Any, ...]) -> torch.device:
    return next(a.device for a in args if isinstance(a, Tensor))


def _product(order: Order, f: Any, a: Tensor, b: Tensor) -> Tensor:
    i = order(a.shape[-1])
    return f(a.index_select(-1, i), b.index_select(-2 if b.ndim > 1 else 0, i))


def _product_and_sum(order: Order, f: Any, c: Tensor, a: Tensor, b: Tensor, **options: Any) -> Any:
    return _product(order, lambda a, b: f(c, a, b, **options), a, b)


def _sum(order: Order, f: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    dims = args[0] if args and args[0] else range(x.ndim)
    for dim in dims:
        x = x.index_select(dim, order(x.shape[dim]))
    return f(x, *args, **options)


def _index_add(
    order: Order, f: Any, x: Tensor, dim: int, index: Tensor, source: Tensor, **options: Any
) -> Any:
    i = order(len(index))
    return f(x, dim, index[i], source.index_select(dim, i), **options)


def _softmax(order: Order, f: Any, x: Tensor, dim: int, *args: Any, **options: Any) -> Tensor:
    i = order(x.shape[dim])
    return f(x.index_select(dim, i), dim, *args, **options).index_select(dim, i.argsort())


def _softmax_backward(order: Order, f: Any, dp: Tensor, p: Tensor, dim: int, *args: Any) -> Tensor:
    i = order(p.shape[dim])
    dx = f(dp.index_select(dim, i), p.index_select(dim, i), dim, *args)
    return dx.index_select(dim, i.argsort())


def _layer_norm(order, f, x, shape, weight, bias, eps):
    i = order(shape[-1])
    y, *statistics = f(x[..., i], shape, _at(weight, i), _at(bias, i), eps)
    return y[..., i.argsort()], *statistics


def _layer_norm_backward(order, f, dy, x, shape, mean, rstd, weight, bias, mask):
    if len(shape) > 1 or x.ndim == 1:
        return f(dy, x, shape, mean, rstd, weight, bias, mask)
    i, rows = order(shape[0]), order(x[..., 0].numel())
    dx, *parameters = f(
        dy.flatten(0, -2)[rows][:, i], x.flatten(0, -2)[rows][:, i], shape,
        mean.flatten()[rows, None], rstd.flatten()[rows, None], _at(weight, i), _at(bias, i), mask,
    )  # fmt: skip
    back = i.argsort()
    dx = None if dx is None else dx[rows.argsort()][:, back].view(x.shape)
    return dx, *(_at(t, back) for t in parameters)


def _attention(order, f, q, k, v, dropout=0.0, causal=False, *, attn_mask=None, scale=None):
    i, j = order(q.shape[-1]), _keys(order, k, causal)
    mask = attn_mask if attn_mask is None or attn_mask.shape[-1] == 1 else attn_mask[..., j]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return f(
        q[..., i], k[..., j, :][..., i], v[..., j, :], dropout, causal, attn_mask=mask, scale=scale
    )


def _attention_backward(
    order, f, dout, q, k, v, out, lse, dropout, causal, *, attn_mask=None, scale=None
):
    i, j, n = order(q.shape[-1]), _keys(order, k, causal), order(v.shape[-1])
    mask = attn_mask if attn_mask is None or attn_mask.shape[-1] == 1 else attn_mask[..., j]
    dq, dk, dv = f(
        dout[..., n], q[..., i], k[..., j, :][..., i], v[..., j, :][..., n], out[..., n], lse,
        dropout, causal, attn_mask=mask, scale=scale,
    )  # fmt: skip
    back, keys = i.argsort(), j.argsort()
    return dq[..., back], dk[..., keys, :][..., back], dv[..., keys, :][..., n.argsort()]


def _keys(order: Order, k: Tensor, causal: bool) -> Tensor:
    keys = order(k.shape[-2])
    return keys.sort().values if causal else keys


def _at(t: Tensor | None, i: Tensor) -> Tensor | None:
    return None if t is None else t[..., i]


_aten = torch.ops.aten
_REORDERED: dict[Any, Callable[..., Any]] = {
    _aten.mm.default: _product,
    _aten.bmm.default: _product,
    _aten.mv.default: _product,
    _aten.dot.default: _product,
    _aten.addmm.default: _product_and_sum,
    _aten.addmv.default: _product_and_sum,
    _aten.baddbmm.default: _product_and_sum,
    _aten.sum.default: _sum,
    _aten.sum.dim_IntList: _sum,
    _aten.mean.default: _sum,
    _aten.mean.dim: _sum,
    _aten.index_add.default: _index_add,
    _aten._softmax.default: _softmax,
    _aten._safe_softmax.default: _softmax,
    _aten._log_softmax.default: _softmax,
    _aten._softmax_backward_data.default: _softmax_backward,
    _aten._log_softmax_backward_data.default: _softmax_backward,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
}
