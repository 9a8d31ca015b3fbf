"""The five recipes, with the hyperparameters of their papers."""

from __future__ import annotations

from vlm_fast.training.recipes.model_parts import CONNECTOR, LANGUAGE
from vlm_fast.training.recipes.recipe import Recipe

LLAVA_STAGE1 = Recipe(
    "llava-stage1", "llava", (CONNECTOR,), "projector", lr=1e-3, batch=256, epochs=1,
    source="arXiv 2310.03744, hyperparameters; projector alone: arXiv 2304.08485, section 4.2",
)  # fmt: skip
LLAVA_STAGE2 = Recipe(
    "llava-stage2", "llava", (CONNECTOR, LANGUAGE), "projector, language model",
    lr=2e-5, batch=128, epochs=1, source="arXiv 2310.03744, hyperparameters",
)  # fmt: skip
BLIP2_STAGE1 = Recipe(
    "blip2-stage1", "blip2-retrieval", (CONNECTOR,), "Q-Former and its heads",
    lr=1e-4, min_lr=1e-5, batch=1680, epochs=10, warmup=2000, weight_decay=0.05, betas=(0.9, 0.98),
    source="arXiv 2301.12597, section 3.4 (batch of ViT-g); min lr and epochs: LAVIS",
)  # fmt: skip
BLIP2_STAGE2 = Recipe(
    "blip2-stage2", "blip2", (CONNECTOR,), "Q-Former and its projection",
    lr=1e-4, min_lr=5e-5, batch=1920, epochs=10, warmup=2000, weight_decay=0.05, betas=(0.9, 0.98),
    source="arXiv 2301.12597, section 3.4 (batch with OPT); epochs: LAVIS",
)  # fmt: skip
FLAMINGO = Recipe(
    "flamingo", "flamingo", (CONNECTOR,), "resampler, gated layers",
    lr=1e-4, min_lr=None, batch=256, epochs=1, warmup=5000, weight_decay=0.1,
    undecayed=("resampler",),
    source="arXiv 2204.14198, appendix B; batch and epochs are choices made here",
)  # fmt: skip

RECIPES = {
    recipe.name: recipe
    for recipe in (LLAVA_STAGE1, LLAVA_STAGE2, BLIP2_STAGE1, BLIP2_STAGE2, FLAMINGO)
}
