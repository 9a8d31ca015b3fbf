"""Training recipes: which parts of a model train in each stage, and the papers' settings."""

from vlm_fast.training.recipes.blip2 import Stage1Objective as Stage1Objective
from vlm_fast.training.recipes.blip2 import Stage2Objective as Stage2Objective
from vlm_fast.training.recipes.freezing import unfreeze as unfreeze
from vlm_fast.training.recipes.presets import RECIPES as RECIPES
from vlm_fast.training.recipes.recipe import Recipe as Recipe
from vlm_fast.training.recipes.text_only_batches import touch_connector as touch_connector
