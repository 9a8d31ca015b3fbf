"""The path between a vision encoder and a language model: exact, small in memory, graph-safe."""

from vlm_fast import ops as ops
from vlm_fast.policy import VlmFastFallbackError as VlmFastFallbackError
from vlm_fast.policy import VlmFastFallbackWarning as VlmFastFallbackWarning
from vlm_fast.policy import disabled as disabled
from vlm_fast.policy import stats as stats
from vlm_fast.policy import strict as strict

__version__ = "0.1.0"
