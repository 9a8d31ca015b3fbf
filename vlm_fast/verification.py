"""``vlm_fast.verify(model, **inputs)``: the patched model against itself without the patch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from vlm_fast import ops, parity
from vlm_fast.anyres import Plan
from vlm_fast.parity import Verdict, judge_all
from vlm_fast.patching import anyres, image_token_merge, patched_modules
from vlm_fast.patching.class_swap import Patched, swap_back
from vlm_fast.patching.media_sets import GivesSets

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Connector:
    """One connector: the verdicts on its output and on every gradient."""

    name: str
    what: str
    verdicts: Sequence[Verdict]

    @property
    def ok(self) -> bool:
        return all(verdict.ok for verdict in self.verdicts)

    def worst(self, kind: str) -> float:
        """Largest error among the "output"s or the "gradient"s."""
        return max((v.error for v in self.verdicts if v.what.startswith(kind)), default=0.0)


@dataclass(frozen=True)
class Verification:
    """The connectors, and how far the whole model's first output moved.

    Attributes:
        connectors: those that the inputs reached.
        unreached: names of patched connectors that they did not. A part of a connector that was
            judged as a whole is not listed by itself.
        output_error: largest difference between the outputs with and without the patch.
        output_scale: largest magnitude of the output without the patch.
    """

    connectors: Sequence[Connector]
    unreached: Sequence[str]
    output_error: float
    output_scale: float

    @property
    def ok(self) -> bool:
        return bool(self.connectors) and all(connector.ok for connector in self.connectors)

    def __str__(self) -> str:
        lines = []
        for c in self.connectors:
            why = "; ".join(f"{v.what}: {v.failure}" for v in c.verdicts if not v.ok)
            lines.append(
                f"{'ok  ' if c.ok else 'FAIL'} {c.name or '(the model)'} ({c.what}): largest error "
                f"{c.worst('output'):.3g} in the output, {c.worst('gradient'):.3g} in gradients"
                + (f"; {why}" if why else "")
            )
        lines += [f"not reached: {name}" for name in self.unreached]
        lines.append(
            f"model output: largest difference {self.output_error:.3g} of {self.output_scale:.3g}"
        )
        return "\n".join(lines)


def verify(model: nn.Module, **inputs: Any) -> Verification:
    """Run a patched model on ``inputs`` and judge each connector by the rule of `parity.judge`.

    Each connector is run on what reached it: with the patch, without it, and without it in float64;
    outputs and gradients (to its inputs and parameters) are compared. The model runs twice in
    forward, under the same random seed; its parameters, gradients and mode are left as they were.

    Raises:
        ValueError: nothing in ``model`` is patched.
    """
    connectors = dict(patched_modules(model))
    if not connectors:
        raise ValueError(f"{type(model).__name__} has no patched connector; call patch() first")
    seen: dict[str, Arguments] = {}
    merges: list[tuple[Tensor, Tensor, Tensor]] = []
    packs: list[tuple[Any, ...]] = []
    hooks = [
        module.register_forward_pre_hook(_keep(seen, name), with_kwargs=True)
        for name, module in connectors.items()
    ]
    observer = lambda *tensors: merges.append(_detached(tensors))  # noqa: E731
    pack_observer = lambda *arguments: packs.append(_detached(arguments))  # noqa: E731
    image_token_merge.OBSERVERS.append(observer)
    anyres.OBSERVERS.append(pack_observer)
    try:
        ours = _first_output(model, inputs)
    finally:
        image_token_merge.OBSERVERS.remove(observer)
        anyres.OBSERVERS.remove(pack_observer)
        for hook in hooks:
            hook.remove()
    theirs = _without_patch(connectors, lambda: _first_output(model, inputs))
    found, whole, unreached = [], [], []
    for name, module in connectors.items():
        what, verdicts = [], []
        plain = module.unpatched() if name in seen and isinstance(module, Patched) else None
        if plain is not None:
            what.append(type(module).patch.mixin.__name__)
            verdicts += _verify_module(module, plain, seen[name])
            whole.append(name)
        if isinstance(module, anyres.FusedAnyRes) and packs:
            what.append("anyres_pack")
            verdicts += [v for pack in packs for v in _verify_pack(*pack)]
        if isinstance(module, image_token_merge.FusedMerge) and merges:
            what.append("merge_image_tokens")
            verdicts += [v for merge in merges for v in _verify_merge(*merge)]
        if what:
            found.append(Connector(name, ", ".join(what), verdicts))
        elif not _within(name, whole) and not (isinstance(module, GivesSets) and name in seen):
            unreached.append(name)
    difference = (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0.0
    return Verification(found, unreached, difference, theirs.abs().max().item())


def _verify_module(module: nn.Module, plain: nn.Module, arguments: Arguments) -> list[Verdict]:
    ours = _module_results(module, arguments)
    exact = _module_results(copy.deepcopy(plain).double(), _floats(arguments, Tensor.double))
    outputs = [name for name in ours if name.startswith("output")]
    return judge_all(ours, lambda: _module_results(plain, arguments), exact, outputs=outputs)


def _module_results(module: nn.Module, arguments: Arguments) -> parity.Results:
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    inputs: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        inputs.append(tensor.detach().requires_grad_())
        return inputs[-1]

    with torch.enable_grad():
        args, kwargs = _floats(arguments, leaf)
        results = [r for r in tree_leaves(module(*args, **kwargs)) if _is_float(r)]
        wanted = [*inputs, *parameters.values()]
        upstream = [parity.random_upstream(result) for result in results]
        grads = torch.autograd.grad(results, wanted, upstream, materialize_grads=True)
    names = ["output" if i == 0 else f"output {i}" for i in range(len(results))]
    names += [f"gradient of input {i}" for i in range(len(inputs))]
    names += [f"gradient of {name}" for name in parameters]
    return dict(zip(names, [*(r.detach() for r in results), *grads], strict=True))


def _floats(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """The arguments with ``change`` applied to floating tensors; a cache, say, is copied.

    Of rows that are one in memory, as queries expanded over a batch, the one is changed: what it
    has as a gradient is their sum.
    """

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        if not value.is_floating_point():
            return value
        once = value[tuple(slice(1 if stride == 0 else None) for stride in value.stride())]
        changed = change(once)
        return changed if once.shape == value.shape else changed.expand(value.shape)

    return tree_map(one, arguments)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _verify_pack(features: Tensor, newline: Tensor | None, plan: Plan) -> list[Verdict]:
    op: Any = ops.anyres_pack_resized if plan.is_resized else ops.anyres_pack
    with torch.enable_grad():
        return parity.check(op, (features, newline, *plan.tables), {}, fast=op)


def _verify_merge(embeds: Tensor, mask: Tensor, features: Tensor) -> list[Verdict]:
    # Rows are copied, so nothing less than equality is expected: native and exact are one.
    theirs = lambda e, f: e.masked_scatter(mask.unsqueeze(-1), f)  # noqa: E731
    ours = lambda e, f: ops.merge_image_tokens(e, f, mask)  # noqa: E731
    with torch.enable_grad():
        runs = [parity.outputs_and_gradients(f, (embeds, features), {}) for f in (ours, theirs)]
    names = ("output", "gradient of inputs_embeds", "gradient of image_features")
    pairs = zip(names, *((*outputs, *gradients) for outputs, gradients in runs), strict=True)
    return [
        Verdict(
            name,
            (a.double() - b.double()).abs().max().item() if a.numel() else 0.0,
            0.0,
            None if torch.equal(a, b) else "not equal",
        )
        for name, a, b in pairs
    ]


def _first_output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    devices = [p.device for p in model.parameters() if p.is_cuda][:1]
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(0)
        output = model(**inputs)
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    # A loss is one number; the tensor after it says more.
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return next((t for t in tensors if t.ndim > 0), tensors[0])


def _without_patch(connectors: dict[str, nn.Module], run: Callable[[], Tensor]) -> Tensor:
    classes = {name: type(module) for name, module in connectors.items()}
    try:
        for module in connectors.values():
            assert isinstance(module, Patched)
            swap_back(module)
        return run()
    finally:
        for name, module in connectors.items():
            module.__class__ = classes[name]


def _keep(seen: dict[str, Arguments], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[name] = _floats((args, kwargs), Tensor.detach)

    return hook


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(module == "" or name.startswith(f"{module}.") for module in modules)


def _detached(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(v.detach() if isinstance(v, Tensor) else v for v in values)
