"""Compare a patched model with the unpatched one: logits, gradients, generated tokens, repeats."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import vlm_fast
from vlm_fast.benchmarks.models.architecture import Inputs
from vlm_fast.benchmarks.models.parts import prompt
from vlm_fast.verification.tolerance import judge_all

NEW_TOKENS = 8


def proof(model: nn.Module, given: Inputs, *, exact: bool) -> dict[str, Any]:
    """Compare the results of the model with and without the patch; it is unpatched afterwards.

    With ``exact`` a copy runs in float64, and `tolerance.judge_all` judges logits and all
    gradients.
    """
    plain = _results(model, given)
    with vlm_fast.patch(model, strict=True) as report:
        patched = _results(model, given)
        repeats = _repeats(model, given, patched)
        verification = vlm_fast.verify(model, **prompt(given))
    return {
        "patched": report.patched,
        "skipped": report.skipped,
        "verified": verification.ok,
        "connectors": {
            c.name: {
                "ok": c.ok, "output_error": c.worst("output"), "gradient_error": c.worst("gradient")
            }
            for c in verification.connectors
        },
        "judged": _judged(model, given, patched) if exact else None,
        "logits_equal": torch.equal(plain["logits"], patched["logits"]),
        "logits_error": (plain["logits"] - patched["logits"]).abs().max().item(),
        "logits_scale": plain["logits"].abs().max().item(),
        "loss_error": abs(plain["loss"] - patched["loss"]),
        **_largest_gradient_error(plain["gradients"], patched["gradients"]),
        "same_tokens": torch.equal(plain["tokens"], patched["tokens"]),
        "repeats_bitwise": repeats,
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    """The comparison in one line of text."""
    logits = "equal" if found["logits_equal"] else f"differ by {found['logits_error']:.3g}"
    gradients = "equal"
    if found["largest_gradient_error"] > 0:
        gradients = (
            f"within {found['largest_gradient_error']:.2g} of the largest "
            f"(worst: {found['largest_gradient_error_in']})"
        )
    judged = found["judged"]
    rule = "" if judged is None else f"; {judged['passed']} of {judged['tensors']} within the rule"
    return (
        f"logits {logits} (largest {found['logits_scale']:.3g}); gradients {gradients}{rule}; "
        f"generated tokens {'the same' if found['same_tokens'] else 'DIFFERENT'}; "
        f"verify {'passed' if found['verified'] else 'FAILED'}; repeats "
        f"{'bitwise equal' if found['repeats_bitwise'] else 'differ'}"
    )


def _backward(model: Any, given: Inputs) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**given, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output, gradients


def _results(model: Any, given: Inputs) -> dict[str, Any]:
    output, gradients = _backward(model, given)
    with torch.no_grad():
        tokens = model.generate(**prompt(given), max_new_tokens=NEW_TOKENS, do_sample=False)
    return {
        "logits": output.logits.detach(),
        "loss": output.loss.item(),
        "gradients": gradients,
        "tokens": tokens,
    }


def _repeats(model: nn.Module, given: Inputs, first: dict[str, Any]) -> bool:
    output, gradients = _backward(model, given)
    return torch.equal(output.logits, first["logits"]) and all(
        torch.equal(gradient, first["gradients"][name]) for name, gradient in gradients.items()
    )


def _judged(model: nn.Module, given: Inputs, patched: dict[str, Any]) -> dict[str, Any]:
    """How many tensors pass the tolerance rule, and why the others do not."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    output, exact = _backward(copy.deepcopy(model).double(), wide)
    exact |= {"logits": output.logits.detach()}

    def native() -> dict[str, Tensor | None]:
        output, gradients = _backward(model, given)
        return {"logits": output.logits.detach(), **gradients}

    ours = {"logits": patched["logits"], **patched["gradients"]}
    verdicts = judge_all(ours, native, exact, outputs=["logits"])
    return {
        "tensors": len(verdicts),
        "passed": sum(verdict.ok for verdict in verdicts),
        "failures": [f"{v.what}: {v.failure}" for v in verdicts if not v.ok],
    }


def _largest_gradient_error(
    plain: dict[str, Tensor], patched: dict[str, Tensor]
) -> dict[str, float | str]:
    """The largest error as a share of the largest gradient, and the parameter that has it."""
    if plain.keys() != patched.keys():
        worst, where = float("inf"), ", ".join(sorted(plain.keys() ^ patched.keys()))
    else:
        errors = {
            name: (patched[name].float() - gradient.float()).abs().max().item()
            for name, gradient in plain.items()
        }
        where = max(errors, key=lambda name: errors[name])
        worst = errors[where] / max(g.abs().max().item() for g in plain.values())
    return {"largest_gradient_error": worst, "largest_gradient_error_in": where}
