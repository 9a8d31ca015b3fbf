"""The element-wise activations of `vlm_fast.ops.mlp` and the other ops with an activation."""

from vlm_fast.kernels._activation import ACTIVATIONS as ACTIVATIONS
from vlm_fast.kernels.mlp import activate as activate
