"""The element-wise activations that `vlm_fast.ops.mlp` and its relatives know, for modules."""

from vlm_fast.kernels._activation import ACTIVATIONS as ACTIVATIONS
from vlm_fast.kernels.mlp import activate as activate
