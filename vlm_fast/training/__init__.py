"""Losses, recipes and data for training connectors. Nothing else in the package imports this."""

from vlm_fast.training import data as data
from vlm_fast.training import losses as losses
from vlm_fast.training import recipes as recipes
