"""The path between a vision encoder and a language model: exact, small in memory, graph-safe."""

from vlm_fast import modules as modules
from vlm_fast import ops as ops
from vlm_fast.advisor import advise as advise
from vlm_fast.fallback import VlmFastFallbackError as VlmFastFallbackError
from vlm_fast.fallback import VlmFastFallbackWarning as VlmFastFallbackWarning
from vlm_fast.fallback import disabled as disabled
from vlm_fast.fallback import stats as stats
from vlm_fast.fallback import strict as strict
from vlm_fast.patching import Report as Report
from vlm_fast.patching import explain as explain
from vlm_fast.patching import patch as patch
from vlm_fast.patching import unpatch as unpatch
from vlm_fast.patching.attention_interface import register_attention as register_attention
from vlm_fast.patching.sharding import connectors as connectors
from vlm_fast.patching.sharding import prepare_zero3 as prepare_zero3
from vlm_fast.patching.sharding import touch_parameters as touch_parameters
from vlm_fast.verification.patched_model import verify as verify

__version__ = "0.1.0"
