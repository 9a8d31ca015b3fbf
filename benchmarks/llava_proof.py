"""That a patched LLaVA is the same model: logits, every gradient, generated tokens, repeats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import vlm_fast

NEW_TOKENS = 8


def proof(llava: nn.Module, given: dict[str, Tensor]) -> dict[str, Any]:
    """Results with the patch against those without it; the model is left without."""
    plain = _results(llava, given)
    with vlm_fast.patch(llava) as report:
        patched = _results(llava, given)
        repeats = _repeats(llava, given, patched)
        prompt = {name: value for name, value in given.items() if name != "labels"}
        verification = vlm_fast.verify(llava, **prompt)
    worst, where = _largest_gradient_error(plain["gradients"], patched["gradients"])
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
        "logits_equal": torch.equal(plain["logits"], patched["logits"]),
        "logits_error": (plain["logits"] - patched["logits"]).abs().max().item(),
        "logits_scale": plain["logits"].abs().max().item(),
        "loss_error": abs(plain["loss"] - patched["loss"]),
        "largest_gradient_error": worst,  # as a share of the largest element of that gradient
        "largest_gradient_error_in": where,
        "same_tokens": torch.equal(plain["tokens"], patched["tokens"]),
        "repeats_bitwise": repeats,
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    """The proof in a line."""
    logits = "equal" if found["logits_equal"] else f"differ by {found['logits_error']:.3g}"
    gradients = "equal"
    if found["largest_gradient_error"] > 0:
        gradients = (
            f"within {found['largest_gradient_error']:.2g} of their largest element "
            f"(worst: {found['largest_gradient_error_in']})"
        )
    return (
        f"logits {logits} (largest {found['logits_scale']:.3g}); gradients {gradients}; "
        f"generated tokens {'the same' if found['same_tokens'] else 'DIFFERENT'}; "
        f"verify {'passed' if found['verified'] else 'FAILED'}; repeats "
        f"{'bitwise equal' if found['repeats_bitwise'] else 'differ'}"
    )


def _backward(llava: Any, given: dict[str, Tensor]) -> Any:
    llava.zero_grad()
    output = llava(**given)
    output.loss.backward()
    return output


def _results(llava: Any, given: dict[str, Tensor]) -> dict[str, Any]:
    output = _backward(llava, given)
    gradients = {name: p.grad for name, p in llava.named_parameters() if p.grad is not None}
    llava.zero_grad()
    prompt = {name: value for name, value in given.items() if name != "labels"}
    with torch.no_grad():
        tokens = llava.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return {
        "logits": output.logits.detach(),
        "loss": output.loss.item(),
        "gradients": gradients,
        "tokens": tokens,
    }


def _repeats(llava: nn.Module, given: dict[str, Tensor], first: dict[str, Any]) -> bool:
    output = _backward(llava, given)
    same = torch.equal(output.logits, first["logits"])
    for name, parameter in llava.named_parameters():
        if parameter.grad is not None:
            same &= torch.equal(parameter.grad, first["gradients"][name])
    llava.zero_grad()
    return same


def _largest_gradient_error(
    plain: dict[str, Tensor], patched: dict[str, Tensor]
) -> tuple[float, str]:
    if plain.keys() != patched.keys():
        return float("inf"), ", ".join(sorted(plain.keys() ^ patched.keys()))
    worst, where = 0.0, ""
    for name, gradient in plain.items():
        scale = gradient.abs().max().float().clamp_min(torch.finfo(torch.float32).tiny)
        error = ((patched[name].float() - gradient.float()).abs().max() / scale).item()
        if error > worst:
            worst, where = error, name
    return worst, where
