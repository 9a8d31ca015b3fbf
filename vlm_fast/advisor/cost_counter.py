"""Count the FLOPs and bytes of a module on the meta device, without computing anything.

An op of this package is counted by its own cost model (`Op.cost_of`), forward and backward. ATen
operations are counted by torch's FLOP formulas for matrix products (``torch.utils.flop_counter``;
other arithmetic counts as 0 FLOPs), and by the bytes that they read and write. Modules take the
same code path as on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm_fast.devtools.memory import saved_bytes
from vlm_fast.ops.declaration import OPS, Cost


@dataclass(frozen=True)
class ModuleCost:
    """Cost of one call of a module.

    Attributes:
        cost: FLOPs and bytes to and from memory, forward and backward.
        parameters: number of parameters.
        saved_bytes: memory that autograd keeps for backward, beyond arguments and results.
    """

    cost: Cost
    parameters: int
    saved_bytes: int

    def __add__(self, other: ModuleCost) -> ModuleCost:
        return ModuleCost(
            add_costs(self.cost, other.cost),
            self.parameters + other.parameters,
            self.saved_bytes + other.saved_bytes,
        )

    def __mul__(self, times: int) -> ModuleCost:
        mine = self.cost
        cost = Cost(
            times * mine.forward_flops, times * mine.forward_bytes,
            times * mine.backward_flops, times * mine.backward_bytes,
        )  # fmt: skip
        return ModuleCost(cost, times * self.parameters, times * self.saved_bytes)


NO_COST = ModuleCost(Cost(0, 0, 0, 0), 0, 0)


def add_costs(one: Cost, other: Cost) -> Cost:
    """Sum of two costs."""
    return Cost(
        one.forward_flops + other.forward_flops, one.forward_bytes + other.forward_bytes,
        one.backward_flops + other.backward_flops, one.backward_bytes + other.backward_bytes,
    )  # fmt: skip


def count_cost(
    make: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, ...]], *, backward: bool = True
) -> ModuleCost:
    """Count one forward and backward of a module.

    Args:
        make: makes the module on the default device.
        inputs: makes its arguments on the default device.
        backward: whether to count backward; saved bytes are counted in any case.

    Raises:
        Exception: whatever the module raises for these arguments.
    """
    with torch.device("meta"), torch.enable_grad():
        module, args = make(), inputs()
        parameters = list(module.parameters())
        given = [t for t in args if isinstance(t, Tensor)]
        results: list[Tensor] = []

        def run() -> Tensor:
            results.append(module(*args))
            return results[0]

        with CostCounter() as counter:
            kept = saved_bytes(run, [*parameters, *given])
            forward = counter.cost
            counter.backward = True
            if backward:
                results[0].backward(torch.empty_like(results[0]))
    cost = counter.cost if backward else replace(forward, backward_flops=0, backward_bytes=0)
    return ModuleCost(cost, sum(p.numel() for p in parameters), kept)


class CostCounter(TorchDispatchMode):
    """A dispatch mode that adds up the cost of everything that runs inside.

    Attributes:
        cost: the sum so far.
        backward: whether ATen operations now belong to backward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cost = NO_COST.cost
        self.backward = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "vlm_fast":
            self.cost = add_costs(self.cost, _cost_of_op(func, args, kwargs))
        else:
            flops, moved = _flops(func, args, kwargs, result), _moved(func, args, kwargs, result)
            of_aten = Cost(0, 0, flops, moved) if self.backward else Cost(flops, moved, 0, 0)
            self.cost = add_costs(self.cost, of_aten)
        return result


def _cost_of_op(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    op = OPS.get(func.name().partition("::")[2].partition(".")[0])
    if op is None:  # a backward op, which was counted with its forward
        return NO_COST.cost
    options = {name: value for name, value in kwargs.items() if name in op.defaults}
    cost = op.cost_of(*args, **options)
    if any(kwargs["needs_grad"]):
        return cost
    return Cost(cost.forward_flops, cost.forward_bytes, 0, 0)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    # not at the top of the file: it imports Triton
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes read and written; 0 if the result is a view or uninitialised memory."""
    # A registered op makes zeros for saved tensors without a gradient; plain eager mode does not.
    if func.namespace != "aten" or func.name().startswith(("aten::empty", "aten::zeros")):
        return 0
    read = {id(t): t for t in _tensors((args, kwargs))}
    written = {id(t): t for t in _tensors(result)}
    sources = {t.untyped_storage()._cdata for t in read.values()}
    targets = {t.untyped_storage()._cdata for t in written.values()}
    if not func._schema.is_mutable and targets and targets <= sources:
        return 0
    return sum(map(_extent, (*read.values(), *written.values())))


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _extent(tensor: Tensor) -> int:
    # An expanded dimension takes the memory of one element.
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()
