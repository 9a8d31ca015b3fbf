"""Losses to train connectors: those of BLIP-2's two stages and SigLIP's, on any number of ranks."""

from vlm_fast.training.losses.blip2_stage1 import Stage1Output as Stage1Output
from vlm_fast.training.losses.blip2_stage1 import itm_loss as itm_loss
from vlm_fast.training.losses.blip2_stage1 import stage1_loss as stage1_loss
from vlm_fast.training.losses.blip2_stage2 import freeze as freeze
from vlm_fast.training.losses.blip2_stage2 import soft_prompt as soft_prompt
from vlm_fast.training.losses.blip2_stage2 import stage2_loss as stage2_loss
from vlm_fast.training.losses.contrastive import ContrastiveOutput as ContrastiveOutput
from vlm_fast.training.losses.contrastive import hard_negatives as hard_negatives
from vlm_fast.training.losses.contrastive import itc_loss as itc_loss
from vlm_fast.training.losses.cross_entropy import LanguageModelHead as LanguageModelHead
from vlm_fast.training.losses.cross_entropy import itg_loss as itg_loss
from vlm_fast.training.losses.rank_exchange import exchange_rows as exchange_rows
from vlm_fast.training.losses.siglip import siglip_loss as siglip_loss
