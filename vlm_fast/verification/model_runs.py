"""Runs of a model that can be compared: from one seed and one state, on the same arguments."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vlm_fast.verification.tolerance import Verdict, judge

T = TypeVar("T")
DRAWS = 8


class ModelRun(NamedTuple):
    """The floating tensors that a model returned, by their place, and whether it drew numbers."""

    outputs: dict[str, Tensor]
    random: bool

    def first(self) -> Tensor:
        """The first that is not one number, as a loss is: it says more."""
        tensors = list(self.outputs.values())
        return next((t for t in tensors if t.ndim > 0), tensors[0] if tensors else torch.zeros(0))


def run(model: nn.Module, inputs: Mapping[str, Any]) -> ModelRun:
    """``model(**inputs)`` without gradients. Buffers, random state and caches stay as they are."""
    given = tree_map(_copied, dict(inputs), is_leaf=_is_leaf)
    with torch.no_grad():
        output, random = seeded(model, lambda: model(**given))
    return ModelRun({path: tensor.clone() for path, tensor in _floating(output)}, random)


def seeded(module: nn.Module, call: Callable[[], T]) -> tuple[T, bool]:
    """What ``call`` gives under one seed, and whether it drew random numbers.

    The random state and the buffers of ``module`` are afterwards what they were.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with buffers_restored(module), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        states = [torch.get_rng_state, *(lambda d=d: torch.cuda.get_rng_state(d) for d in devices)]
        before = [state() for state in states]
        result = call()
        drew = any(not torch.equal(b, state()) for b, state in zip(before, states, strict=True))
    return result, drew


@contextlib.contextmanager
def buffers_restored(module: nn.Module) -> Iterator[None]:
    """Buffers are afterwards the same tensors with the same values, also after an exception."""
    owners = [(m, dict(m._buffers), set(m._non_persistent_buffers_set)) for m in module.modules()]
    buffers = {id(b): b for _, own, _ in owners for b in own.values() if b is not None}
    kept = [(b, b.data, b.detach().clone()) for b in buffers.values() if not b.is_meta]
    try:
        yield
    finally:
        for owner, own, unsaved in owners:
            owner._buffers.clear()
            owner._buffers.update(own)
            owner._non_persistent_buffers_set = unsaved
        for buffer, memory, value in kept:
            if not torch.equal(memory, value):
                with torch.no_grad():
                    memory.copy_(value)
            if buffer.shape != memory.shape or buffer.data_ptr() != memory.data_ptr():
                buffer.data = memory


@contextlib.contextmanager
def perturbed(
    modules: Mapping[str, nn.Module], budgets: Mapping[str, Sequence[float]], draw: int
) -> Iterator[None]:
    """Within it the modules' results are off by rounding, which random numbers stand for.

    Args:
        budgets: by how much at most, for each floating result of a module; by a unit in the last
            place of each element where a module has none.
        draw: which random numbers.
    """
    calls = 0

    def hook(name: str) -> Callable[..., Any]:
        def change(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal calls
            results = 0

            def one(value: Any) -> Any:
                nonlocal calls, results
                if not is_float(value):
                    return value
                calls += 1
                own = budgets.get(name, ())
                budget = own[results] if results < len(own) else math.nan
                results += 1
                generator = torch.Generator(value.device).manual_seed(1000 * calls + draw)
                noise = torch.rand(value.shape, generator=generator, device=value.device) * 2 - 1
                unit = torch.finfo(value.dtype).eps * value.abs()
                amount = budget if math.isfinite(budget) else unit
                return torch.where(
                    value.isfinite(), value + (noise * amount).to(value.dtype), value
                )

            return tree_map(one, output, is_leaf=_is_leaf)

        return change

    hooks = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def judge_outputs(
    ours: ModelRun, theirs: ModelRun, rounded: Callable[[int], ModelRun]
) -> list[Verdict]:
    """Judge what a model returned by how far rounding moves what it should have returned.

    The rule is that of `parity.judge`: ``theirs`` is exact, and the error that is native is the
    largest of any draw of rounding. One draw is mostly enough; the more there are, the less a small
    result, as a loss is, hangs on luck.

    Args:
        rounded: the run in which rounding is drawn with this number.
    """
    if ours.outputs.keys() != theirs.outputs.keys():
        names = sorted(ours.outputs.keys() ^ theirs.outputs.keys())
        return [Verdict(name, math.nan, math.nan, "only on one side") for name in names]
    exact = {name: output.double() for name, output in theirs.outputs.items()}
    drawn: list[dict[str, Tensor]] = []
    verdicts: list[Verdict] = []
    for draw in range(DRAWS):
        drawn.append(rounded(draw).outputs)
        verdicts = [
            judge(name, ours.outputs[name], native, exact[name], others=[d[name] for d in drawn])
            for name, native in theirs.outputs.items()
        ]
        if all(verdict.ok for verdict in verdicts):
            break
    return verdicts


def _floating(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating tensors in nested results, with the way to them. A cache is no result."""
    if is_float(value):
        yield path or "output", value
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping):
        value = vars(value)
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, (list, tuple)):
        inner = enumerate(value)
    for key, item in inner:
        yield from _floating(item, f"{path}.{key}" if path else str(key))


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_leaf(value: Any) -> bool:
    # A cache that a model writes to may be a pytree as well.
    return not isinstance(value, (dict, list, tuple))


def _copied(value: Any) -> Any:
    return value if isinstance(value, Tensor) else copy.deepcopy(value)
