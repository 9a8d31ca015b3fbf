"""The support matrix of the README: each connector, and what tests and results files show of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import results_files

ROOT = results_files.PACKAGE.parent
SERVED = ROOT / "tests" / "tools" / "served.json"
SHOWN = 5  # names of models in a row; docs/releases.md has all
TRANSFORMERS = "5.17.0"  # the release whose column of `SERVED` is shown

# What a patched class serves, in a word or two.
SERVES = {
    "FusedShuffleMerge": ("merge", "pixel shuffle"),
    "FusedNormedMLP": ("projector",),
    "FusedPatchMerger": ("patch merger",),
    "FusedUnfoldingMerger": ("patch merger",),
    "FusedConnector": ("pixel shuffle",),
    "FusedGatedProjector": ("pixel shuffle",),
    "FusedShuffleMLP": ("pixel shuffle",),
    "FusedPooledNorm": ("pooling",),
    "FusedPooledMLP": ("pooling", "projector"),
    "FusedPooler": ("pooling",),
    "FusedPooledFrames": ("merge", "tiles", "pooling"),
    "FusedFrameProjector": ("projector",),
    "FusedMLP": ("projector",),
    "FusedAnyResMerge": ("merge", "tiles"),
    "FusedAnyRes": ("tiles",),
    "FusedMerge": ("merge",),
    "FusedQFormerModel": ("Q-Former",),
    "FusedQFormerEncoder": ("Q-Former",),
    "FusedQFormerLayer": ("Q-Former",),
    "FusedIdeficsPerceiver": ("resampler",),
    "FusedIdefics2Perceiver": ("resampler",),
    "FusedAriaProjector": ("resampler",),
    "FusedKosmosProjection": ("resampler",),
    "FusedGatedMLP": ("gated MLP",),
    "FusedIdeficsModel": ("gated layers",),
    "FusedIdeficsLayer": ("gated layers",),
    "FusedMllamaModel": ("gated layers",),
    "FusedMllamaLayer": ("gated layers",),
}


@dataclass(frozen=True)
class Connector:
    """A row of the matrix.

    Attributes:
        name: for readers.
        serves: the word of `SERVES`.
        ops: that its kernels are in.
        compiled: what torch.compile does with it, and the test of it.
        sharded: the test under FSDP2, or "" where there is none.
    """

    name: str
    serves: str
    ops: tuple[str, ...]
    compiled: tuple[str, str]
    sharded: str


ONE_GRAPH = "one graph"
WHOLE_MODELS = ("patching/test_sharding.py", "whole_model_matches_one_process")
TEXT_RANKS = ("patching/test_text_only_ranks.py", "text_only_rank_trains")
CONNECTORS = (
    Connector(
        "MLP projector", "projector", ("mlp", "act_linear"),
        (ONE_GRAPH, "patching/test_compiled_first.py::test_one_graph_before_first_call"),
        "::".join(WHOLE_MODELS),
    ),
    Connector(
        "image-token merge", "merge", ("merge_image_tokens",),
        (ONE_GRAPH, "patching/test_compiled_first.py::test_one_graph_before_first_call"),
        "::".join(WHOLE_MODELS),
    ),
    Connector(
        "AnyRes tiles", "tiles", ("anyres_pack", "anyres_pack_resized", "anyres_merge"),
        ("breaks at sizes, as unpatched",
         "patching/test_anyres_models.py::test_compiled_patched_model_matches_unpatched"),
        "::".join(TEXT_RANKS),
    ),
    Connector(
        "patch merger", "patch merger", ("pixel_shuffle_norm", "mlp"),
        (ONE_GRAPH, "modules/test_mergers.py::test_compiles_to_one_graph"), "::".join(TEXT_RANKS),
    ),
    Connector(
        "pixel shuffle", "pixel shuffle", ("pixel_shuffle_norm",),
        (ONE_GRAPH, "patching/test_compiled_first.py::test_one_graph_before_first_call"), "",
    ),
    Connector(
        "pooling", "pooling", ("spatial_pool",),
        (ONE_GRAPH, "modules/test_mergers.py::test_compiles_to_one_graph"), "",
    ),
    Connector(
        "Q-Former", "Q-Former", ("self_attention", "cross_attention", "add_layer_norm", "mlp"),
        (ONE_GRAPH, "patching/test_wrapped_models.py::test_whole_model_compiles_to_one_graph"),
        "::".join(WHOLE_MODELS),
    ),
    Connector(
        "Perceiver resampler", "resampler", ("cross_attention", "mlp"),
        (ONE_GRAPH, "patching/test_wrapped_models.py::test_whole_model_compiles_to_one_graph"),
        "::".join(WHOLE_MODELS),
    ),
    Connector(
        "gated cross-attention", "gated layers",
        ("media_cross_attention", "gated_add", "gated_add_norm", "gated_mlp"),
        (ONE_GRAPH, "patching/test_wrapped_models.py::test_whole_model_compiles_to_one_graph"),
        "::".join(WHOLE_MODELS),
    ),
)  # fmt: skip


def served_words(cell: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What a patch serves of a family in one release; merge and tiles come first."""
    served = (cell or {}).get("served", [])
    found = {word for kind in served for word in SERVES.get(kind, (kind,))}
    return tuple(sorted(found, key=lambda word: (word not in ("merge", "tiles"), word)))


def matrix(results: Sequence[dict[str, Any]], served: Path = SERVED) -> str:
    """The table, as Markdown.

    Args:
        results: contents of results files; those of GPUs are shown.
        served: a file as `SERVED`, which ``make versions`` writes.
    """
    cells = json.loads(served.read_text())
    gpus = [result for result in results if result["device"] == "cuda"]
    lines = [
        "| connector | models | forward and backward | torch.compile | FSDP2 | verified on a GPU |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for connector in CONNECTORS:
        families = served_families(cells, connector.serves)
        equal = [f for f in families if cells[f][TRANSFORMERS]["outcome"] == "equal"]
        lines.append(
            f"| {connector.name} | {first_few([f for f in families if ' ' not in f])} | "
            f"equal in {len(equal)} of {len(families)} | {connector.compiled[0]} | "
            f"{'tested' if connector.sharded else 'not tested'} | "
            f"{verified(connector.ops, gpus)} |"
        )
    return "\n".join(lines)


def first_few(names: Sequence[str]) -> str:
    """The names, shortened to `SHOWN` and the number of the others."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def served_families(cells: Mapping[str, Any], word: str) -> list[str]:
    """The test cases of `SERVED` in which a patch serves this."""
    return [f for f, releases in cells.items() if word in served_words(releases.get(TRANSFORMERS))]


def verified(ops: Sequence[str], gpus: Sequence[dict[str, Any]]) -> str:
    """On which GPUs ops passed, at which commit, and how many cases of each that failed."""
    found = []
    for result in gpus:
        parity = {name: result.get("parity", {}).get(name) for name in ops if name in OPS}
        ran = {name: entry for name, entry in parity.items() if entry is not None}
        if not ran:
            continue
        failed = {name: len(entry["failures"]) for name, entry in ran.items() if entry["failures"]}
        never = [f"{name} never ran" for name in parity if name not in ran]
        words = [f"{count} failures of {name}" for name, count in failed.items()]
        older = not all(
            proof.current for name in ran for proof in results_files.proofs(OPS[name], [result])
        )
        at = f"{result['machine']} at {short(result['commit'])}"
        notes = words + never + (["the source changed since"] if older else [])
        found.append(f"{at}: {', '.join(['passed', *notes] if not failed else notes)}")
    return "; ".join(found) or "no"


def short(commit: str | None) -> str:
    """Twelve digits of a commit, and the plus sign of a tree with changes."""
    return commit[:12] + commit[40:] if commit else "unknown commit"
