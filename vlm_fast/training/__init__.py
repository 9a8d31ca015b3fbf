"""Losses, recipes and data to train connectors. The rest of the package does not import this."""

from vlm_fast.training import data as data
from vlm_fast.training import losses as losses
from vlm_fast.training import recipes as recipes
