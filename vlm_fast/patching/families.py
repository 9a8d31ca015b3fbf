"""The table of connectors that `vlm_fast.patch` knows: a mixin and its recogniser per connector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlm_fast.patching.models import (
    anyres,
    aria,
    frame_pooler,
    gated_projector,
    idefics,
    idefics2,
    image_token_merge,
    internvl,
    kosmos2,
    mllama,
    mlp,
    openflamingo,
    patch_merger,
    perceiver,
    pixel_shuffle,
    pooling,
    qformer,
    qformer_classes,
    qformer_model,
)
from vlm_fast.patching.patched_module import PatchedModule

# A recogniser is called with a module and the options of `vlm_fast.patch`. It returns the settings
# of the patch, a string that says why the module is not patched, or None for an unrelated module.
# The first entry that returns settings is used.
FAMILIES: list[tuple[type[PatchedModule], Callable[..., Any]]] = [
    (internvl.FusedShuffleMerge, internvl.recognise_model),
    (internvl.FusedNormedMLP, internvl.recognise_projector),
    (patch_merger.FusedPatchMerger, patch_merger.recognise),
    (patch_merger.FusedUnfoldingMerger, patch_merger.recognise_unfolding),
    (pixel_shuffle.FusedConnector, pixel_shuffle.recognise_connector),
    (gated_projector.FusedGatedProjector, gated_projector.recognise),
    (pixel_shuffle.FusedShuffleMLP, pixel_shuffle.recognise_llama4),
    (pooling.FusedPooledNorm, pooling.recognise_gemma3),
    (pooling.FusedPooledMLP, pooling.recognise_perception_lm),
    (frame_pooler.FusedPooler, frame_pooler.recognise),
    (pooling.FusedPooledFrames, pooling.recognise_onevision),
    (pooling.FusedFrameProjector, pooling.recognise_frame_projector),
    (mlp.FusedMLP, mlp.recognise),
    (anyres.FusedAnyResMerge, lambda module, **_: anyres.recognise(module)),
    (anyres.FusedAnyRes, lambda module, **_: anyres.recognise_packing(module)),
    (image_token_merge.FusedMerge, lambda module, **_: image_token_merge.recognise(module)),
    (qformer_model.FusedQFormerModel, qformer_classes.recognise_model),
    (qformer.FusedQFormerEncoder, qformer_classes.recognise_encoder),
    (qformer.FusedQFormerLayer, qformer_classes.recognise_layer),
    (openflamingo.FusedGatedBlock, openflamingo.recognise),
    (perceiver.FusedPerceiver, perceiver.recognise),
    (perceiver.FusedIdeficsPerceiver, perceiver.recognise_idefics),
    (aria.FusedAriaProjector, aria.recognise),
    (kosmos2.FusedKosmosProjection, kosmos2.recognise),
    (idefics2.FusedIdefics2Perceiver, idefics2.recognise_resampler),
    (idefics2.FusedGatedMLP, idefics2.recognise_mlp),
    (idefics.FusedIdeficsModel, idefics.recognise_model),
    (idefics.FusedIdeficsLayer, idefics.recognise_layer),
    (mllama.FusedMllamaModel, mllama.recognise_model),
    (mllama.FusedMllamaLayer, mllama.recognise_layer),
]
