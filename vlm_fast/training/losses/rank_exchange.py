"""Collectives on rows of tensors, with gradients. Without a process group nothing is sent.

All of them are built on all-gather and all-to-all. Their backward functions use these two as well,
and sum the gradients of several ranks in the order of the ranks, so that the result does not depend
on the order in which a backend reduces. `torch.distributed.nn.functional` does not promise that.
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
# Collectives send a dtype as its index in this list.
DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)


class World(NamedTuple):
    """The number of ranks in a process group, and this process's rank in it."""

    size: int
    rank: int


def get_world(group: Any) -> World:
    """The size and rank of a process group; one rank if torch.distributed is not initialised.

    Raises:
        ValueError: this process is not a member of ``group``.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return World(1, 0)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise ValueError("vlm_fast.training.losses: this rank is not in group, expected a member")
    return World(size, rank)


def check_same_on_ranks(name: str, facts: Sizes, device: torch.device, group: Any) -> None:
    """Check that every size and dtype in ``facts`` is the same on all ranks.

    Args:
        name: of the public function that checks, for the message.
        facts: sizes and dtypes of this rank by name.
        device: where the collective's tensors are; the host waits for it.
        group: the process group; None is the default one.

    Raises:
        ValueError: on every rank, if ranks differ.
    """
    check_same(name, gather_sizes(facts, device, group))


def gather_sizes(facts: Sizes, device: torch.device, group: Any) -> dict[str, list[Any]]:
    """Gather sizes and dtypes from every rank with one small all-gather.

    The host reads the result, so it waits for the device.

    Args:
        facts: sizes and dtypes of this rank by name.
        device: where the collective's tensors are.
        group: the process group; None is the default one.

    Returns:
        For each name the list of values, in the order of the ranks.
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
    """Check that each list of values, one value per rank, holds only one value.

    Raises:
        ValueError: the values of a name differ.
    """
    for fact, found in facts.items():
        if len(set(found)) > 1:
            raise ValueError(
                f"vlm_fast.{name}: {fact} is {found} on ranks 0 to {len(found) - 1}, "
                "expected the same on every rank"
            )


def gather_rows(tensor: Tensor, group: Any = None) -> Tensor:
    """Concatenate the rows of all ranks, in the order of the ranks; differentiable.

    Backward returns to each rank the sum of the gradients that all ranks have for its rows.

    Args:
        tensor: ``(rows, ...)``, with the same shape on every rank.
        group: the process group; None is the default one.

    Returns:
        ``(ranks * rows, ...)``.
    """
    world = get_world(group)
    return tensor if world.size == 1 else _Gather.apply(tensor, world, group)


def all_to_all_rows(
    tensor: Tensor, sent: Sequence[int], received: Sequence[int], group: Any = None
) -> Tensor:
    """Send ``sent[r]`` rows to each rank r and receive ``received[r]`` rows from it.

    Differentiable: backward sends each row's gradient back to the rank that the row came from. Rows
    are taken and concatenated in the order of the ranks.

    Args:
        tensor: ``(sum(sent), ...)``.
        sent, received: numbers of rows for each rank.
        group: the process group; None is the default one.

    Returns:
        ``(sum(received), ...)``.
    """
    if get_world(group).size == 1:
        return tensor
    return _AllToAll.apply(tensor, list(sent), list(received), group)


def exchange_rows(tensor: Tensor, rows: Tensor, group: Any = None) -> Tensor:
    """Index the concatenation of ``tensor`` over all ranks: ``concatenated[rows]``; differentiable.

    Only the requested rows are sent, from the rank that has them to the rank that asks. The row
    numbers of all ranks are gathered first, and the host reads how many rows each pair of ranks
    exchanges.

    Args:
        tensor: ``(batch, ...)``, any dtype, with the same shape on every rank.
        rows: ``(count,)`` int64, from 0 to ranks * batch - 1, with the same count on every rank.
        group: the process group; None is the default one, or a single process if there is none.

    Returns:
        ``(count, ...)``. The gradient of a row goes back to the rank that has it, where the
            gradients of several ranks are added in the order of the ranks.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: ``rows`` is not ``(count,)`` int64 on the device of ``tensor``. In a process
            group also, on every rank: tensors differ in shape or dtype, or a row number is out of
            range. In a single process indexing raises for a number out of range.
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
    requested = gathered[:, len(facts) :]
    owner = requested.div(max(batch, 1), rounding_mode="floor")
    ranks = torch.arange(world.size, device=rows.device)
    read = torch.cat([gathered[:, : len(facts)], (owner[:, :, None] == ranks).sum(1)], 1).tolist()
    batches, sizes, dtypes = (list(column) for column in zip(*(r[:3] for r in read), strict=True))
    even = {"rows of tensor": batches, "numbers in a row": sizes}
    check_same(name, {**even, "dtype of tensor": [DTYPES[n] for n in dtypes]})
    # counts[r][s]: number of rows that rank r requests from rank s.
    counts = [r[3:] for r in read]
    if any(sum(wanted) != count for wanted in counts):
        raise ValueError(
            f"vlm_fast.{name}: rows has a number outside 0 to {world.size * batch - 1}, "
            f"expected rows of {world.size} ranks with {batch} each"
        )
    here = world.rank
    received = [0 if rank == here else counts[here][rank] for rank in range(world.size)]
    sent = [0 if rank == here else counts[rank][here] for rank in range(world.size)]
    # The requests of other ranks for rows of this rank, in the order of the ranks; and this rank's
    # requests in the order of the ranks that have the rows, its own rows last.
    others = (owner == here) & (ranks[:, None] != here)
    leaving = others.flatten().int().argsort(descending=True, stable=True)[: sum(sent)]
    order = owner[here].masked_fill(owner[here] == here, world.size).argsort(stable=True)
    staying = rows[order[sum(received) :]]
    local = torch.cat([requested.flatten()[leaving], staying]) - here * batch
    # Index ``tensor`` only once: the backward of that index adds all gradients of a row in one
    # order.
    chosen = tensor[local]
    arrived = all_to_all_rows(chosen[: sum(sent)], sent, received, group)
    return torch.cat([arrived, chosen[sum(sent) :]])[order.argsort()]


def ring_blocks(
    tensor: Tensor, batches: Sequence[int], world: World, group: Any
) -> Iterator[tuple[int, Tensor]]:
    """Yield (rank, rows of that rank) for every rank, from this one around the ring.

    The next block is received while the caller works on the current one, so at most two blocks are
    in memory. Not differentiable.

    Args:
        tensor: ``(rows, ...)``, this rank's block.
        batches: the number of rows of each rank.
        world, group: the process group.
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
    """Start to send ``tensor`` to the previous rank and to receive ``rows`` rows from the next one.

    It is an all-to-all in which all other sizes are 0; NCCL turns it into one send and one receive.

    Returns:
        A function that waits for the received rows and returns them.
    """
    if world.size == 1:
        return lambda: tensor
    sent, received = [0] * world.size, [0] * world.size
    sent[world.rank - 1], received[(world.rank + 1) % world.size] = len(tensor), rows
    leaving, out = tensor.contiguous(), tensor.new_empty(rows, *tensor.shape[1:])
    work = dist.all_to_all_single(out, leaving, received, sent, group=group, async_op=True)

    # keeps the tensor alive until it has been sent
    def arrive(_leaving: Tensor = leaving) -> Tensor:
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
        return all_to_all_rows(grad, *ctx.back), None, None, None  # itself differentiable


def _all_gather(tensor: Tensor, world: World, group: Any) -> Tensor:
    # torch 2.13 introduced the first name and deprecated the second.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    out = tensor.new_empty(world.size * len(tensor), *tensor.shape[1:])
    gather(out, tensor.contiguous(), group=group)
    return out


def _all_to_all(tensor: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    out = tensor.new_empty(sum(received), *tensor.shape[1:])
    dist.all_to_all_single(out, tensor.contiguous(), received, sent, group=group)
    return out
