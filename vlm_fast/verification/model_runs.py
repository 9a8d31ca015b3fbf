"""Reproducible runs of a model: same seed, same state and same arguments."""

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
    """The result of one forward.

    Attributes:
        outputs: floating tensors that the model returned, by their path.
        random: whether the model drew random numbers.
    """

    outputs: dict[str, Tensor]
    random: bool

    def first(self) -> Tensor:
        """The first output that is not a scalar (a loss says little), else the first output."""
        tensors = list(self.outputs.values())
        return next((t for t in tensors if t.ndim > 0), tensors[0] if tensors else torch.zeros(0))


def run(model: nn.Module, inputs: Mapping[str, Any]) -> ModelRun:
    """Run ``model(**inputs)`` without gradients. Buffers, random state and caches are restored."""
    given = tree_map(_copied, dict(inputs), is_leaf=_is_leaf)
    with torch.no_grad():
        output, random = seeded(model, lambda: model(**given))
    return ModelRun({path: tensor.clone() for path, tensor in _floating(output)}, random)


def seeded(module: nn.Module, call: Callable[[], T]) -> tuple[T, bool]:
    """The result of ``call`` under a fixed seed, and whether it drew random numbers.

    The random state and the buffers of ``module`` are restored.
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
    """Restore buffers to the same tensors with the same values, also after an exception."""
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
    """Inside, random noise of the size of rounding errors is added to the modules' results.

    Args:
        modules: by name.
        budgets: noise amplitude of each floating result by module name. Results without a budget
            get noise of one unit in the last place of each element.
        draw: number of the random sequence.
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
    """Judge a model's outputs by how far rounding in its connectors moves the expected ones.

    The rule is that of `tolerance.judge` with ``theirs`` as the exact result. The allowed error is
    the largest one of several random perturbations. One is mostly enough; more make small outputs,
    such as a loss, depend less on chance.

    Args:
        ours: run with the patch.
        theirs: run without the patch.
        rounded: runs without the patch but with perturbation number n.
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
    """Yield the floating tensors in nested results with their paths; caches are not entered."""
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
    # Caches may be registered as pytrees, but must be copied as a whole.
    return not isinstance(value, (dict, list, tuple))


def _copied(value: Any) -> Any:
    return value if isinstance(value, Tensor) else copy.deepcopy(value)
