"""A LLaVA of transformers on a photograph, without and with ``vlm_fast.patch``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import vlm_fast
from benchmarks import llava_model, llava_proof, machine
from benchmarks.llava_model import IMAGE_TOKENS
from vlm_fast import ops, tables
from vlm_fast.measure import memory, timing

Row = dict[str, Any]
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
MODELS = {
    "whole": "LLaVA-1.5-7B",
    "connector": "LLaVA-1.5-7B's connector in a cut-down model",
    "small": "small LLaVA",
}
# (batch, sequence, hidden) of the merges measured alone, with an image in each row.
MERGES = ((4, 2048, 4096), (2, 2048, 1024))


def main(
    *, quick: bool = False, device: str | None = None, seconds: float = 10.0
) -> dict[str, Any]:
    """Measure, about ``seconds`` a part, print tables, and return what was found."""
    seconds = 0.2 if quick else seconds
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype, size = DTYPE[device], llava_model.size_for(device, quick=quick)
    # What fits: the whole model's proof holds three gradients of every parameter.
    batch = 1 if device == "cpu" else 2 if size == "whole" else 8
    pixel_values, source = llava_model.pixels(*llava_model.photograph())
    llava = llava_model.model(device, dtype, size=size)
    given = llava_model.inputs(pixel_values, batch, device, dtype)
    found: dict[str, Any] = {
        "photograph": source,
        "model": MODELS[size],
        "parameters": sum(p.numel() for p in llava.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "sequence": given["input_ids"].shape[1],
        "image_tokens": IMAGE_TOKENS,
        "merges": [],
    }
    with timing.one_thread():
        found["proof"] = llava_proof.proof(llava, given)
        found["rows"] = compare(llava, given, device, seconds)
        if device == "cpu":
            found["merges"] = merges(MERGES[1:] if quick else MERGES, seconds)
    show(found, device)
    return found


def compare(llava: nn.Module, given: dict[str, Tensor], device: str, seconds: float) -> list[Row]:
    """Each part without and with the patch, in turns, on two models that share every tensor."""
    shared = {id(t): t for t in (*llava.parameters(), *llava.buffers())}
    patched = copy.deepcopy(llava, dict(shared))  # its memo: what is in it is not copied
    vlm_fast.patch(patched, strict=True)
    tensors, before, after = list(shared.values()), parts(llava, given), parts(patched, given)
    rows = []
    for name in before:
        calls = {"before": before[name], "after": after[name]}
        rows += _measure(name, calls, device, seconds, tensors)
    return rows


def _measure(
    name: str, calls: dict[str, Callable[[], Any]], device: str, seconds: float, known: list[Tensor]
) -> list[Row]:
    times = timing.interleaved(
        calls, [()], device=device, seconds=seconds, rounds=(3, 100), wall=True
    )
    return [
        {
            "part": name,
            "state": state,
            **asdict(times[state]),
            "saved_bytes": memory.saved_bytes(call, known),
            "peak_bytes": memory.peak_bytes(call, device),
            "synchronisations": memory.synchronisations(call, device),
            "ours_is": timing.verdict(times["after"], times["before"]) if state == "after" else "",
        }
        for state, call in calls.items()
    ]


def parts(llava: Any, given: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """The connector's two halves alone, then the whole model."""
    embeds = llava.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
    batch, _, width = embeds.shape
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(embeds.device, embeds.dtype)

    # As the tower hands them over: the class token left out, so with gaps between the images.
    tokens = random(batch, IMAGE_TOKENS + 1, llava.config.vision_config.hidden_size)[:, 1:]
    tokens.requires_grad_()
    features = random(batch, IMAGE_TOKENS, width).requires_grad_()
    d_projected, d_merged = random(batch, IMAGE_TOKENS, width), random(*embeds.shape)
    projector = llava.model.multi_modal_projector
    prompt = {name: value for name, value in given.items() if name != "labels"}

    def merge() -> Tensor:
        # The lines of LlavaModel.forward between projector and language model.
        mask = llava.model.get_placeholder_mask(
            given["input_ids"], inputs_embeds=embeds, image_features=features
        )
        return embeds.masked_scatter(mask, features)

    def projector_step() -> Any:
        wanted = (tokens, *projector.parameters())
        return torch.autograd.grad(projector(tokens), wanted, d_projected)

    def train_step() -> None:
        llava(**given).loss.backward()
        llava.zero_grad()

    return {
        "projector, forward": torch.no_grad()(lambda: projector(tokens)),
        "projector, forward+backward": projector_step,
        "merge, forward": torch.no_grad()(merge),
        "merge, forward+backward": lambda: torch.autograd.grad(
            merge(), (embeds, features), d_merged
        ),
        "prefill": torch.no_grad()(lambda: llava(**prompt).logits),
        "train step": train_step,
    }


def merges(shapes: tuple[tuple[int, int, int], ...], seconds: float) -> list[Row]:
    """The merge alone, against ``masked_scatter`` with the mask that transformers makes."""
    rows = []
    for batch, sequence, hidden in shapes:
        torch.manual_seed(0)
        mask = torch.zeros(batch, sequence, dtype=torch.bool)
        mask[:, 5 : 5 + IMAGE_TOKENS] = True
        embeds = torch.randn(batch, sequence, hidden, requires_grad=True)
        features = torch.randn(batch, IMAGE_TOKENS, hidden, requires_grad=True)
        dy, wanted = torch.randn(batch, sequence, hidden), (embeds, features)
        functions = {
            "before": lambda e=embeds, f=features, m=mask: e.masked_scatter(m.unsqueeze(-1), f),
            "after": lambda e=embeds, f=features, m=mask: ops.merge_image_tokens(e, f, m),
        }
        backward = {
            state: lambda f=function, w=wanted, g=dy: torch.autograd.grad(f(), w, g)
            for state, function in functions.items()
        }
        forward = {state: torch.no_grad()(function) for state, function in functions.items()}
        shape = f"{batch} x {sequence} x {hidden}"
        known = [embeds, features, mask]
        rows += _measure(f"{shape}, forward", forward, "cpu", seconds, known)
        rows += _measure(f"{shape}, forward+backward", backward, "cpu", seconds, known)
    return rows


def show(found: dict[str, Any], device: str) -> None:
    threads = ", one thread" if device == "cpu" else ""
    title = (
        f"{found['model']}, {found['dtype']}, batch {found['batch']}, {found['sequence']} tokens "
        f"({found['image_tokens']} of an image), on {machine.name(device)}{threads}"
    )
    columns = ("part", "", "median", "quartiles", "saved MB", "peak MB", "waits", "after is")
    tables.show(title, columns, [_cells(row) for row in found["rows"]])
    if found["merges"]:
        tables.show("merge alone, float32, one thread", columns, map(_cells, found["merges"]))
    print(f"{found['photograph']}: {llava_proof.line(found['proof'])}")


def _cells(row: Row) -> tuple[object, ...]:
    return (
        row["part"], row["state"], f"{row['median'] * 1e3:.2f} ms",
        f"{row['lower'] * 1e3:.2f}-{row['upper'] * 1e3:.2f}",
        f"{row['saved_bytes'] / 1e6:.2f}", f"{row['peak_bytes'] / 1e6:.2f}",
        row["synchronisations"], row["ours_is"],
    )  # fmt: skip
