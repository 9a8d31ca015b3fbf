"""All ops as functions, such as `vlm_fast.ops.mlp`; importing this package declares them."""

from vlm_fast.ops.act_linear import act_linear as act_linear
from vlm_fast.ops.add_layer_norm import add_layer_norm as add_layer_norm
from vlm_fast.ops.anyres_merge import anyres_merge as anyres_merge
from vlm_fast.ops.anyres_pack import anyres_pack as anyres_pack
from vlm_fast.ops.anyres_pack_resized import anyres_pack_resized as anyres_pack_resized
from vlm_fast.ops.bipartite_match import bipartite_match as bipartite_match
from vlm_fast.ops.cross_attention import cross_attention as cross_attention
from vlm_fast.ops.gated_add import gated_add as gated_add
from vlm_fast.ops.gated_add_norm import gated_add_norm as gated_add_norm
from vlm_fast.ops.gated_mlp import gated_mlp as gated_mlp
from vlm_fast.ops.gather_image_tokens import gather_image_tokens as gather_image_tokens
from vlm_fast.ops.max_similarity import max_similarity as max_similarity
from vlm_fast.ops.media_cross_attention import media_cross_attention as media_cross_attention
from vlm_fast.ops.merge_image_tokens import merge_image_tokens as merge_image_tokens
from vlm_fast.ops.merge_tokens import merge_tokens as merge_tokens
from vlm_fast.ops.mlp import mlp as mlp
from vlm_fast.ops.norm_mlp import norm_mlp as norm_mlp
from vlm_fast.ops.pixel_shuffle_norm import pixel_shuffle_norm as pixel_shuffle_norm
from vlm_fast.ops.qformer_layer import qformer_layer as qformer_layer
from vlm_fast.ops.self_attention import self_attention as self_attention
from vlm_fast.ops.spatial_pool import spatial_pool as spatial_pool
from vlm_fast.ops.stacked_linear import stacked_linear as stacked_linear
from vlm_fast.ops.unmerge_tokens import unmerge_tokens as unmerge_tokens
