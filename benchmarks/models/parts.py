"""The measured parts of a whole model: connectors, prefill, a generated token, a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from vlm_fast.benchmarks.before_and_after import Part, without_gradients
from vlm_fast.benchmarks.models.architecture import Architecture, Inputs, States
from vlm_fast.verification import tolerance

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def parts_of(architecture: Architecture, states: States, given: Inputs) -> Iterator[Part]:
    """Yield the parts; ``states`` are two models that share all tensors, before and after."""
    shared = [*states["before"].parameters(), *states["before"].buffers(), *given.values()]
    for words, kind in architecture.connectors.items():
        yield from _connector(words, kind, states, given, shared)
    yield from architecture.more(states, given)
    asked = prompt(given)

    def prefill(model: nn.Module) -> Tensor:
        return model(**asked).logits

    def step(model: nn.Module) -> list[Tensor]:
        model(**given, use_cache=False).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return gradients

    yield Part("prefill", without_gradients({s: partial(prefill, m) for s, m in states.items()}))
    if architecture.acts_in_decoding:
        tokens = {state: next_token(model, given) for state, model in states.items()}
        yield Part("a generated token", without_gradients(tokens))
    yield Part("train step", {s: partial(step, m) for s, m in states.items()}, shared)


def prompt(given: Inputs) -> Inputs:
    """The arguments without labels."""
    return {name: value for name, value in given.items() if name != "labels"}


def _connector(
    words: str, kind: str, states: States, given: Inputs, shared: list[Tensor]
) -> Iterator[Part]:
    """A module on the inputs that it gets in a training step."""
    forward: dict[str, Callable[[], Any]] = {}
    both: dict[str, Callable[[], Any]] = {}
    known = list(shared)
    for state, model in states.items():
        module = next(m for m in model.modules() if type(m).__name__ == kind)
        args, kwargs = _reaching(module, model, given)
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known += leaves
        wanted = [t for t in (*leaves, *module.parameters()) if t.requires_grad]
        forward[state] = partial(module, *args, **kwargs)
        both[state] = partial(_gradients, forward[state], wanted)
    yield Part(f"{words}, forward", without_gradients(forward))
    yield Part(f"{words}, forward+backward", both, known)


def _reaching(module: nn.Module, model: nn.Module, given: Inputs) -> Arguments:
    """The module's arguments in a training step, as leaves that need gradients as in the model."""
    found: list[Arguments] = []

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().requires_grad_(value.requires_grad)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(tree_map(leaf, (args, kwargs)))

    hook = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model(**given, use_cache=False)
    finally:
        hook.remove()
    return found[0]


def _gradients(call: Callable[[], Any], wanted: list[Tensor]) -> tuple[Tensor | None, ...]:
    result = tree_leaves(call())[0]
    upstream = _upstream(result)
    return torch.autograd.grad(result, wanted, upstream, allow_unused=True)


_MADE: dict[tuple[Any, ...], Tensor] = {}


def _upstream(result: Tensor) -> Tensor:
    """An upstream gradient for results of this shape; made once, so all states get the same."""
    key = result.shape, result.dtype, result.device
    if key not in _MADE:
        _MADE[key] = tolerance.random_upstream(result)
    return _MADE[key]


def next_token(model: Any, given: Inputs) -> Callable[[], Tensor]:
    """Return the step after a prefill, as in ``generate``; each call restores the cache first.

    A cache appends by making longer tensors, so its tensors from after the prefill are unchanged.
    """
    options: dict[str, Any] = {**prompt(given), "use_cache": True}
    ids = options.pop("input_ids")
    with torch.no_grad():
        first = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **options)
        output = model(**first)
        options = model._update_model_kwargs_for_generation(output, options, False)
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
    arguments = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **options)
    layers = arguments["past_key_values"].layers
    prefilled = [(layer.keys, layer.values) for layer in layers]

    def step() -> Tensor:
        for layer, (keys, values) in zip(layers, prefilled, strict=True):
            layer.keys, layer.values = keys, values
        return model(**arguments).logits

    return step
