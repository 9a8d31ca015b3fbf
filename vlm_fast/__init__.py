"""The path between a vision encoder and a language model: exact, small in memory, graph-safe."""

from vlm_fast import data as data
from vlm_fast import modules as modules
from vlm_fast import objectives as objectives
from vlm_fast import ops as ops
from vlm_fast import recipes as recipes
from vlm_fast.design import advise as advise
from vlm_fast.distributed import connectors as connectors
from vlm_fast.distributed import prepare_zero3 as prepare_zero3
from vlm_fast.distributed import touch_parameters as touch_parameters
from vlm_fast.patching import Report as Report
from vlm_fast.patching import explain as explain
from vlm_fast.patching import patch as patch
from vlm_fast.patching import unpatch as unpatch
from vlm_fast.patching.attention_interface import register_attention as register_attention
from vlm_fast.policy import VlmFastFallbackError as VlmFastFallbackError
from vlm_fast.policy import VlmFastFallbackWarning as VlmFastFallbackWarning
from vlm_fast.policy import disabled as disabled
from vlm_fast.policy import stats as stats
from vlm_fast.policy import strict as strict
from vlm_fast.verification import verify as verify

__version__ = "0.1.0"
