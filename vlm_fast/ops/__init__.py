"""The functional ops; importing this declares them."""

from vlm_fast.ops.image_tokens import gather_image_tokens as gather_image_tokens
from vlm_fast.ops.image_tokens import merge_image_tokens as merge_image_tokens
from vlm_fast.ops.mlp import mlp as mlp
