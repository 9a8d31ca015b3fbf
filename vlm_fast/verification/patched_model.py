"""``vlm_fast.verify(model, **inputs)``: compare a patched model with itself without the patch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from vlm_fast import ops
from vlm_fast.ops.anyres_plan import Plan
from vlm_fast.patching import patched_modules
from vlm_fast.patching.class_swap import swap_back
from vlm_fast.patching.media_masks import ProvidesMediaMask
from vlm_fast.patching.models import anyres, image_token_merge
from vlm_fast.patching.patched_module import PatchedModule
from vlm_fast.verification import tolerance
from vlm_fast.verification.model_runs import (
    ModelRun,
    is_float,
    judge_outputs,
    perturbed,
    run,
    seeded,
)
from vlm_fast.verification.tolerance import Verdict, judge_all

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Connector:
    """The verdicts on one connector.

    Attributes:
        name: of the module in the model.
        what: names of the patch and of ops that were judged.
        verdicts: on its outputs and on every gradient.
    """

    name: str
    what: str
    verdicts: Sequence[Verdict]

    @property
    def ok(self) -> bool:
        """Whether all verdicts passed."""
        return all(verdict.ok for verdict in self.verdicts)

    def worst(self, kind: str) -> float:
        """The largest error of verdicts whose name starts with "output" or "gradient"."""
        return max((v.error for v in self.verdicts if v.what.startswith(kind)), default=0.0)


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        connectors: verdicts on those that ``inputs`` ran.
        unreached: names of patched connectors that ``inputs`` never ran. Submodules of a verified
            connector are not listed.
        outputs: the verdict on each floating tensor that the model returned.
        incomparable: why outputs were not judged, or None.
        output_error: largest difference between the first outputs with and without the patch.
        output_scale: largest magnitude of the first output without the patch.
    """

    connectors: Sequence[Connector]
    unreached: Sequence[str]
    outputs: Sequence[Verdict]
    incomparable: str | None
    output_error: float
    output_scale: float

    @property
    def ok(self) -> bool:
        """Whether a connector was reached and every verdict passed."""
        judged = [c.ok for c in self.connectors] + [v.ok for v in self.outputs]
        return bool(self.connectors) and all(judged)

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
        lines += [f"FAIL output {v.what}: {v.failure}" for v in self.outputs if not v.ok]
        if self.incomparable is not None:
            lines.append(f"model output not judged: {self.incomparable}")
        lines.append(
            f"model output: largest difference {self.output_error:.3g} of {self.output_scale:.3g}"
        )
        return "\n".join(lines)


RANDOM = "the model draws random numbers, others with the patch than without (dropout: call eval())"

NOTHING = "the model returned no floating tensor"


def verify(model: nn.Module, **inputs: Any) -> Verification:
    """Run a patched model on ``inputs``, and judge its outputs and each connector.

    Each connector is called with the arguments that reached it: with the patch, without it, and
    without it in float64. Outputs and gradients of inputs and parameters are compared by
    `tolerance.judge`. A connector with active dropout is judged in eval mode.

    The model's outputs with the patch may differ from those without it as much as rounding
    explains: as far as they move if each connector's output moves by its allowed error. With active
    dropout, outputs are not judged.

    The model runs forward four times under the same random seed, and more often only before an
    output is called wrong. Parameters, gradients, buffers, mode and random state are not changed.

    Args:
        model: patched by `vlm_fast.patch`.
        inputs: arguments of its forward.

    Raises:
        ValueError: nothing in ``model`` is patched.
    """
    connectors = dict(patched_modules(model))
    if not connectors:
        raise ValueError(f"{type(model).__name__} has no patched connector; call patch() first")
    ours = run(model, inputs)  # run without hooks first, because hooks can make a module fall back
    seen, merges, packs = _observed(model, connectors, inputs)
    with _without_patch(connectors):
        theirs = run(model, inputs)
    found, whole, unreached = [], [], []
    for name, module in connectors.items():
        what, verdicts = [], []
        plain = (
            module.unpatched_copy() if name in seen and isinstance(module, PatchedModule) else None
        )
        if plain is not None:
            judged, random = _verify_module(module, plain, seen[name])
            dropout = " without dropout" if random else ""
            what.append(type(module).patch_spec.mixin.__name__ + dropout)
            verdicts += judged
            whole.append(name)
        if isinstance(module, anyres.FusedAnyRes) and packs:
            what.append("anyres_pack")
            verdicts += [v for pack in packs for v in _verify_pack(*pack)]
        if isinstance(module, image_token_merge.FusedMerge) and merges:
            what.append("merge_image_tokens")
            verdicts += [v for merge in merges for v in _verify_merge(*merge)]
        if what:
            found.append(Connector(name, ", ".join(what), verdicts))
        elif not _within(name, whole) and not (
            isinstance(module, ProvidesMediaMask) and name in seen
        ):
            unreached.append(name)
    outputs: list[Verdict] = []
    incomparable = NOTHING if not theirs.outputs else None
    if ours.random or theirs.random:
        incomparable = RANDOM
    else:
        budgets = {
            c.name: [v.budget for v in c.verdicts if v.what.startswith("output")]
            for c in found
            if c.name in whole
        }

        def rounded(draw: int) -> ModelRun:
            with _without_patch(connectors), perturbed(connectors, budgets, draw):
                return run(model, inputs)

        outputs = judge_outputs(ours, theirs, rounded)
    mine, plain_output = ours.first(), theirs.first()
    same = mine.shape == plain_output.shape and mine.numel() > 0
    difference = (mine.double() - plain_output.double()).abs().max().item() if same else 0.0
    scale = plain_output.abs().max().item() if plain_output.numel() else 0.0
    return Verification(found, unreached, outputs, incomparable, difference, scale)


def _observed(
    model: nn.Module, connectors: dict[str, nn.Module], inputs: dict[str, Any]
) -> tuple[dict[str, Arguments], list[Any], list[Any]]:
    """The last arguments of each connector, and the arguments of every merge and every pack."""
    seen: dict[str, Arguments] = {}
    merges: list[tuple[Tensor, Tensor, Tensor]] = []
    packs: list[tuple[Any, ...]] = []
    hooks = [
        module.register_forward_pre_hook(_keep(seen, name), with_kwargs=True)
        for name, module in connectors.items()
    ]
    try:
        with (
            _recorded_calls(image_token_merge, "merge_image_tokens", merges),
            _recorded_calls(anyres, "pack_tiles", packs),
        ):
            run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, merges, packs


@contextlib.contextmanager
def _recorded_calls(module: Any, name: str, calls: list[Any]) -> Iterator[None]:
    """Inside this context the arguments of each call of a module's function are recorded."""
    function = getattr(module, name)

    def recording(*arguments: Any) -> Any:
        calls.append(_detached(arguments))
        return function(*arguments)

    setattr(module, name, recording)
    try:
        yield
    finally:
        setattr(module, name, function)


def _verify_module(
    module: nn.Module, plain: nn.Module, arguments: Arguments
) -> tuple[list[Verdict], bool]:
    """The verdicts, and whether dropout was active, so that it was judged in eval mode."""
    (ours, drew), (_, plain_drew) = (_module_results(m, arguments) for m in (module, plain))
    random = drew or plain_drew
    with _evaluating(module, plain) if random else contextlib.nullcontext():
        if random:
            ours, _ = _module_results(module, arguments)
        wide = copy.deepcopy(plain).double()
        exact, _ = _module_results(wide, _floats(arguments, Tensor.double))
        outputs = [name for name in ours if name.startswith("output")]
        native = lambda: _module_results(plain, arguments)[0]  # noqa: E731
        return judge_all(ours, native, exact, outputs=outputs), random


@contextlib.contextmanager
def _evaluating(*roots: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for root in roots for module in root.modules()]
    try:
        for root in roots:
            root.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _module_results(
    module: nn.Module, arguments: Arguments
) -> tuple[dict[str, Tensor | None], bool]:
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    inputs: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        inputs.append(tensor.detach().requires_grad_())
        return inputs[-1]

    def run_both_ways() -> tuple[list[Tensor], Sequence[Tensor]]:
        args, kwargs = _floats(arguments, leaf)
        results = [r for r in tree_leaves(module(*args, **kwargs)) if is_float(r)]
        upstream = [tolerance.random_upstream(result) for result in results]
        wanted = [*inputs, *parameters.values()]
        return results, torch.autograd.grad(results, wanted, upstream, materialize_grads=True)

    with torch.enable_grad():
        (results, grads), random = seeded(module, run_both_ways)
    names = ["output" if i == 0 else f"output {i}" for i in range(len(results))]
    names += [f"gradient of input {i}" for i in range(len(inputs))]
    names += [f"gradient of {name}" for name in parameters]
    tensors = [*(r.detach() for r in results), *grads]
    return dict(zip(names, tensors, strict=True)), random


def _floats(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """The arguments with ``change`` applied to floating tensors, and others copied.

    Of an expanded tensor, such as queries expanded over a batch, only the one row in memory is
    changed, so that its gradient is the sum over the rows.
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


def _verify_pack(features: Tensor, newline: Tensor | None, plan: Plan) -> list[Verdict]:
    op: Any = ops.anyres_pack_resized if plan.is_resized else ops.anyres_pack
    with torch.enable_grad():
        return tolerance.check(op, (features, newline, *plan.tables), {}, fast=op)


def _verify_merge(embeds: Tensor, features: Tensor, mask: Tensor) -> list[Verdict]:
    # Merging copies rows, so the results must be equal.
    theirs = lambda e, f: e.masked_scatter(mask.unsqueeze(-1), f)  # noqa: E731
    ours = lambda e, f: ops.merge_image_tokens(e, f, mask)  # noqa: E731
    with torch.enable_grad():
        runs = [tolerance.outputs_and_gradients(f, (embeds, features), {}) for f in (ours, theirs)]
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


@contextlib.contextmanager
def _without_patch(connectors: dict[str, nn.Module]) -> Iterator[None]:
    classes = {name: type(module) for name, module in connectors.items()}
    try:
        for module in connectors.values():
            assert isinstance(module, PatchedModule)
            swap_back(module)
        yield
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
