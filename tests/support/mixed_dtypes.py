"""Runs models and connectors with parameters and inputs of several dtypes, plain and patched."""

import contextlib
import copy
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import vlm_fast
from vlm_fast.verification import tolerance
from vlm_fast.verification.summation_orders import ReorderedRuns

BF16, FP32 = torch.bfloat16, torch.float32
# By name: which modules change their dtype, and what the model has before and after.
ARRANGEMENTS = {
    "all in fp32": (FP32, FP32, lambda model, connectors: []),
    "connectors in fp32": (BF16, FP32, lambda model, connectors: connectors),
    "connectors in bf16": (FP32, BF16, lambda model, connectors: connectors),
    "norms in fp32": (BF16, FP32, lambda model, connectors: norms(model)),
    "norms in bf16": (FP32, BF16, lambda model, connectors: norms(model)),
    "language model in bf16": (FP32, BF16, lambda model, connectors: language(model)),
    "first linears in fp32": (BF16, FP32, lambda model, connectors: linears(connectors, 0)),
    "last linears in fp32": (BF16, FP32, lambda model, connectors: linears(connectors, -1)),
}


class Run(NamedTuple):
    """Floating results by name, or the exception that was raised."""

    found: dict[str, Any]
    raised: Exception | None


def norms(model):
    return [m for m in model.modules() if "norm" in type(m).__name__.lower()]


def language(model):
    names = ("language_model", "text_model", "decoder", "lm_head")
    return [m for name, m in model.named_modules() if name.split(".")[-1] in names]


def linears(connectors, which):
    found = [[m for m in c.modules() if isinstance(m, torch.nn.Linear)] for c in connectors]
    return [of_one[which] for of_one in found if of_one]


def arranged(model, arrangement):
    """A copy of the model in these dtypes, a patched copy, and the input dtype."""
    fast = copy.deepcopy(model)
    vlm_fast.patch(fast)
    names = [name for name, _ in vlm_fast.connectors(fast)]
    before, after, chosen = ARRANGEMENTS[arrangement]
    for one in (plain := copy.deepcopy(model), fast):
        one.to(before)
        for module in chosen(one, [one.get_submodule(name) for name in names]):
            module.to(after)
    return plain, fast, before


def cast(value, dtype):
    return tree_map_only(
        torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, copy.deepcopy(value)
    )


def run(module, args, kwargs, *, autocast=False):
    """All floating results, and the gradients of floating inputs and parameters."""
    inputs = []

    def leaf(tensor):
        if not tensor.is_floating_point():
            return tensor
        inputs.append(tensor.detach().clone().requires_grad_())
        return inputs[-1]

    args, kwargs = tree_map_only(torch.Tensor, leaf, (args, kwargs))
    region = torch.autocast("cpu", BF16) if autocast else contextlib.nullcontext()
    torch.manual_seed(0)
    try:
        with region:
            result = module(*args, **kwargs)
        result = result["logits"] if hasattr(result, "logits") else result
        results = [r for r in tree_leaves(result) if _is_float(r)]
        named = {f"input {i}": leaf for i, leaf in enumerate(inputs)}
        named |= dict(module.named_parameters())
        named = {name: leaf for name, leaf in named.items() if leaf.requires_grad}
        upstream = [tolerance.random_upstream(r) for r in results]
        gradients = torch.autograd.grad(results, list(named.values()), upstream, allow_unused=True)
    except (RuntimeError, TypeError, ValueError) as error:
        return Run({}, error)
    found = {f"output {i}": r.detach() for i, r in enumerate(results)}
    return Run(found | dict(zip(named, gradients, strict=True)), None)


def _is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def dtypes(run):
    return {name: None if t is None else t.dtype for name, t in run.found.items()}


def assert_alike(run_plain, fast, exact):
    """Check that both raise, or that dtypes are equal and the patched errors are small enough.

    ``run_plain`` runs the unpatched model; ``exact`` makes the reference run for errors.
    """
    plain = run_plain()
    if plain.raised is not None or fast.raised is not None:
        assert plain.raised is not None, f"only the patched one raises: {fast.raised}"
        assert fast.raised is not None, f"only the unpatched one raises: {plain.raised}"
        assert "dtype" in str(fast.raised) or str(fast.raised) == str(plain.raised)
        return
    assert dtypes(fast) == dtypes(plain)
    if all(t is None or torch.equal(t, fast.found[n]) for n, t in plain.found.items()):
        return
    true_values, others = exact().found, ReorderedRuns(lambda: run_plain().found)
    for name, theirs in plain.found.items():
        if theirs is None:
            continue
        true = true_values[name]
        gradient = not name.startswith("output")
        draws = (draw[name] for draw in others)
        verdict = tolerance.judge(
            name, fast.found[name], theirs, true, gradient=gradient, others=draws
        )
        assert verdict.ok or _is_noise(theirs, true), verdict


def _is_noise(theirs, true):
    """Whether a gradient is zero up to rounding."""
    error = (theirs.double() - true).norm()
    return bool(error > 0.5 * true.double().norm())
