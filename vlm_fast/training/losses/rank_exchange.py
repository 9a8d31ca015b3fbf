"""Rows that cross ranks, with their gradients. Without a process group nothing is sent.

Two collectives of torch.distributed carry everything, all-gather and all-to-all: each is the
adjoint of one made of the other, and sums are taken here, in the order of the ranks, so that
gradients do not depend on the backend's own order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vlm_fast.ops.argument_errors import not_a_tensor, wrong_value

Sizes = dict[str, "int | torch.dtype"]
# A dtype travels as its number.
DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)


class World(NamedTuple):
    """The ranks among which a batch is divided, and the place of this one."""

    size: int
    rank: int


def get_world(group: Any) -> World:
    """One rank, unless torch.distributed has been initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return World(1, 0)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise ValueError("vlm_fast.training.losses: this rank is not in group, expected a member")
    return World(size, rank)


def check_same_on_ranks(name: str, facts: Sizes, device: torch.device, group: Any) -> None:
    """Raise ValueError on every rank, if one of ``facts`` is not the same on all."""
    check_same(name, gather_sizes(facts, device, group))


def gather_sizes(facts: Sizes, device: torch.device, group: Any) -> dict[str, list[Any]]:
    """Each of ``facts``, a size or a dtype, on every rank, in the order of the ranks.

    One small all-gather, which the host reads: it waits for the device.
    """
    world = get_world(group)
    if world.size == 1:
        return {fact: [own] for fact, own in facts.items()}
    numbers = [DTYPES.index(f) if isinstance(f, torch.dtype) else f for f in facts.values()]
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    per_rank = _all_gather(own, world, group).view(world.size, -1).t().tolist()
    return {
        name: [DTYPES[n] for n in found] if isinstance(fact, torch.dtype) else found
        for (name, fact), found in zip(facts.items(), per_rank, strict=True)
    }


def check_same(name: str, facts: dict[str, list[Any]]) -> None:
    """Raise ValueError, if one of ``facts``, as `facts_of_ranks` gives them, is not even."""
    for fact, found in facts.items():
        if len(set(found)) > 1:
            raise ValueError(
                f"vlm_fast.{name}: {fact} is {found} on ranks 0 to {len(found) - 1}, "
                "expected the same on every rank"
            )


def gather_rows(tensor: Tensor, group: Any = None) -> Tensor:
    """``(ranks * rows, ...)``: the rows of every rank, in the order of the ranks; differentiable.

    Backward adds up what every rank says of a row. Every rank brings as many rows.
    """
    world = get_world(group)
    return tensor if world.size == 1 else _Gather.apply(tensor, world, group)


def all_to_all_rows(
    tensor: Tensor, sent: Sequence[int], received: Sequence[int], group: Any = None
) -> Tensor:
    """``sent[r]`` rows to rank r in order, ``received[r]`` from it, concatenated; differentiable.

    Backward sends each row's gradient back to where the row came from.
    """
    if get_world(group).size == 1:
        return tensor
    return _AllToAll.apply(tensor, list(sent), list(received), group)


def exchange_rows(tensor: Tensor, rows: Tensor, group: Any = None) -> Tensor:
    """``world[rows]``, where ``world`` is the concatenation of ``tensor`` over the ranks.

    Only the rows asked for travel, each from its owner to who asks; own rows stay. The numbers
    are gathered first and their owners counted, which the host reads (with a process group).

    Args:
        tensor: ``(batch, ...)``, any dtype; of one shape on every rank.
        rows: ``(count,)`` int64, from 0 to ranks * batch - 1; as many on every rank.
        group: the process group; None is the default one, or a single process without one.

    Returns:
        ``(count, ...)``, differentiable: the gradient of a row goes back to its owner, where
        those of several ranks are added in the order of the ranks.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: rows is not ``(count,)`` int64 on the device of tensor. In a process group, on
            every rank, tensors of other shapes or dtypes, and a number beyond the last row; in one
            process indexing says that.
    """
    name = "exchange_rows"
    for argument, value in (("tensor", tensor), ("rows", rows)):
        if not isinstance(value, Tensor):
            raise not_a_tensor(name, argument, value)
    if tensor.ndim < 1:
        raise wrong_value(name, "tensor", tensor, "(batch, ...)")
    if rows.ndim != 1 or rows.dtype != torch.int64 or rows.device != tensor.device:
        raise wrong_value(name, "rows", rows, f"(count,) torch.int64 on {tensor.device}")
    world = get_world(group)
    if world.size == 1:
        return tensor[rows]
    batch, count = len(tensor), len(rows)
    facts = rows.new_tensor([batch, math.prod(tensor.shape[1:]), DTYPES.index(tensor.dtype)])
    gathered = _all_gather(torch.cat([facts, rows]), world, group).view(world.size, -1)
    asked = gathered[:, len(facts) :]
    owner = asked.div(max(batch, 1), rounding_mode="floor")
    ranks = torch.arange(world.size, device=rows.device)
    read = torch.cat([gathered[:, : len(facts)], (owner[:, :, None] == ranks).sum(1)], 1).tolist()
    batches, sizes, dtypes = (list(column) for column in zip(*(r[:3] for r in read), strict=True))
    even = {"rows of tensor": batches, "numbers in a row": sizes}
    check_same(name, {**even, "dtype of tensor": [DTYPES[n] for n in dtypes]})
    # counts[r][s]: how many rows rank r wants of rank s.
    counts = [r[3:] for r in read]
    if any(sum(wanted) != count for wanted in counts):
        raise ValueError(
            f"vlm_fast.{name}: rows has a number outside 0 to {world.size * batch - 1}, "
            f"expected rows of {world.size} ranks with {batch} each"
        )
    here = world.rank
    received = [0 if rank == here else counts[here][rank] for rank in range(world.size)]
    sent = [0 if rank == here else counts[rank][here] for rank in range(world.size)]
    # What others want of this rank, in the order of the ranks; and the own requests in the order
    # of their owners, those that stay last.
    others = (owner == here) & (ranks[:, None] != here)
    leaving = others.flatten().int().argsort(descending=True, stable=True)[: sum(sent)]
    order = owner[here].masked_fill(owner[here] == here, world.size).argsort(stable=True)
    staying = rows[order[sum(received) :]]
    local = torch.cat([asked.flatten()[leaving], staying]) - here * batch
    # One gather of own rows: its backward adds up all that comes back to a row, in one order.
    chosen = tensor[local]
    arrived = all_to_all_rows(chosen[: sum(sent)], sent, received, group)
    return torch.cat([arrived, chosen[sum(sent) :]])[order.argsort()]


def ring_blocks(
    tensor: Tensor, batches: Sequence[int], world: World, group: Any
) -> Iterator[tuple[int, Tensor]]:
    """(rank, its rows) for every rank, the own first and then around the ring.

    While the caller works on some rows the next are on their way, and no more than these two are
    in memory. Not differentiable: `pass_on` is the way back. ``batches``: the rows of each rank.
    """
    for rank in (r % world.size for r in range(world.rank, world.rank + world.size)):
        after = (rank + 1) % world.size
        if after == world.rank:
            yield rank, tensor
        else:
            arrive = ring_shift(tensor, batches[after], world, group)
            yield rank, tensor
            tensor = arrive()


def ring_shift(tensor: Tensor, rows: int, world: World, group: Any) -> Callable[[], Tensor]:
    """Start to send ``tensor`` to the rank before, and to receive ``rows`` rows of the rank after.

    Call what it returns to wait for these rows. An all-to-all in which all others send nothing:
    NCCL makes of it one send and one receive.
    """
    if world.size == 1:
        return lambda: tensor
    sent, received = [0] * world.size, [0] * world.size
    sent[world.rank - 1], received[(world.rank + 1) % world.size] = len(tensor), rows
    leaving, out = tensor.contiguous(), tensor.new_empty(rows, *tensor.shape[1:])
    work = dist.all_to_all_single(out, leaving, received, sent, group=group, async_op=True)

    def arrive(_leaving: Tensor = leaving) -> Tensor:  # which has to live until it has been sent
        work.wait()
        return out

    return arrive


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: World, group: Any) -> Tensor:
        ctx.world, ctx.group = world, group
        return _all_gather(tensor, world, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        size = ctx.world.size
        even = [len(grad) // size] * size
        per_rank = all_to_all_rows(grad, even, even, ctx.group).unflatten(0, (size, -1))
        wide = torch.promote_types(grad.dtype, torch.float32)
        return per_rank.sum(0, dtype=wide).to(grad.dtype), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, sent: list[int], received: list[int], group: Any
    ) -> Tensor:
        ctx.back = received, sent, group
        return _all_to_all(tensor, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all_rows(grad, *ctx.back), None, None, None  # differentiable in its turn


def _all_gather(tensor: Tensor, world: World, group: Any) -> Tensor:
    # torch 2.13 calls it by the first name and warns of the second.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    out = tensor.new_empty(world.size * len(tensor), *tensor.shape[1:])
    gather(out, tensor.contiguous(), group=group)
    return out


def _all_to_all(tensor: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    out = tensor.new_empty(sum(received), *tensor.shape[1:])
    dist.all_to_all_single(out, tensor.contiguous(), received, sent, group=group)
    return out
