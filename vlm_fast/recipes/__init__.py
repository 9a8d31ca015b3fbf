"""The stages in which these models are trained: what is frozen, and the numbers of the papers."""

from vlm_fast.recipes.blip2 import Stage1Objective as Stage1Objective
from vlm_fast.recipes.blip2 import Stage2Objective as Stage2Objective
from vlm_fast.recipes.frozen import thaw as thaw
from vlm_fast.recipes.imageless import touch as touch
from vlm_fast.recipes.published import RECIPES as RECIPES
from vlm_fast.recipes.recipe import Recipe as Recipe
