"""Modules with the parameter names of the original checkpoints."""

from vlm_fast.modules.mlp_projector import LinearProjector as LinearProjector
from vlm_fast.modules.mlp_projector import MLPProjector as MLPProjector
