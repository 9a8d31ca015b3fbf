"""Connectors as modules, with the parameter names of the original checkpoints."""

from torch import nn

from vlm_fast.modules.anyres_packer import AnyResPacker as AnyResPacker
from vlm_fast.modules.gated_cross_attention import (
    GatedCrossAttentionBlock as GatedCrossAttentionBlock,
)
from vlm_fast.modules.gated_cross_attention import MaskedCrossAttention as MaskedCrossAttention
from vlm_fast.modules.gated_cross_attention import MediaKeyValues as MediaKeyValues
from vlm_fast.modules.mlp_projector import MLPProjector as MLPProjector
from vlm_fast.modules.patch_merger import PatchMerger as PatchMerger
from vlm_fast.modules.patch_merger import PixelShuffleProjector as PixelShuffleProjector
from vlm_fast.modules.perceiver_resampler import PerceiverAttention as PerceiverAttention
from vlm_fast.modules.perceiver_resampler import PerceiverResampler as PerceiverResampler
from vlm_fast.modules.pooled_projector import PooledMLPProjector as PooledMLPProjector
from vlm_fast.modules.pooled_projector import PooledNormProjector as PooledNormProjector
from vlm_fast.modules.qformer.model import QFormer as QFormer
from vlm_fast.modules.qformer.model import QFormerOutput as QFormerOutput
from vlm_fast.modules.qformer.shared_inputs import ImageKeyValues as ImageKeyValues
from vlm_fast.modules.sequential_projector import SequentialProjector as SequentialProjector
from vlm_fast.modules.shuffled_projector import PixelShuffleConnector as PixelShuffleConnector
from vlm_fast.modules.shuffled_projector import PixelShuffleMLP as PixelShuffleMLP
from vlm_fast.modules.shuffled_projector import RaggedMergerProjector as RaggedMergerProjector
from vlm_fast.modules.spatial_pool import SpatialPool as SpatialPool
from vlm_fast.modules.token_budget import TokenBudget as TokenBudget
from vlm_fast.modules.token_merger import MergedTokens as MergedTokens
from vlm_fast.modules.token_merger import TokenMerger as TokenMerger
from vlm_fast.modules.token_merger import proportional_bias as proportional_bias


def _not_scriptable(module: nn.Module) -> nn.Module:
    """Called by torch.jit.script before it compiles a module; raises RuntimeError."""
    raise RuntimeError(
        f"vlm_fast.{type(module).__name__}: torch.jit.script does not compile it; "
        "use torch.jit.trace or torch.export, or script the functions of vlm_fast.ops"
    )


for _module in list(globals().values()):
    if isinstance(_module, type) and issubclass(_module, nn.Module) and "forward" in vars(_module):
        _module.__prepare_scriptable__ = _not_scriptable  # type: ignore[attr-defined]
