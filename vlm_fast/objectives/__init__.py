"""What connectors are trained with: the losses of BLIP-2's two stages, and SigLIP's."""

from vlm_fast.objectives._exchange import exchange_rows as exchange_rows
from vlm_fast.objectives.blip2 import Stage1 as Stage1
from vlm_fast.objectives.blip2 import itm_loss as itm_loss
from vlm_fast.objectives.blip2 import stage1_loss as stage1_loss
from vlm_fast.objectives.contrastive import Contrast as Contrast
from vlm_fast.objectives.contrastive import hard_negatives as hard_negatives
from vlm_fast.objectives.contrastive import itc_loss as itc_loss
from vlm_fast.objectives.generative import freeze as freeze
from vlm_fast.objectives.generative import soft_prompt as soft_prompt
from vlm_fast.objectives.generative import stage2_loss as stage2_loss
from vlm_fast.objectives.language import LanguageModelHead as LanguageModelHead
from vlm_fast.objectives.language import itg_loss as itg_loss
from vlm_fast.objectives.sigmoid import siglip_loss as siglip_loss
