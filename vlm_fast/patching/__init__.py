"""Patch a model in place: its connectors then run on the fused ops of this package."""

from vlm_fast.patching.attention_interface import register_attention as register_attention
from vlm_fast.patching.patch_model import explain as explain
from vlm_fast.patching.patch_model import patch as patch
from vlm_fast.patching.patch_model import unpatch as unpatch
from vlm_fast.patching.report import Report as Report
from vlm_fast.patching.report import patched_modules as patched_modules
from vlm_fast.patching.sharding import connectors as connectors
from vlm_fast.patching.sharding import prepare_zero3 as prepare_zero3
from vlm_fast.patching.sharding import touch_parameters as touch_parameters
