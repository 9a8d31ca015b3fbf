"""Dispatch modes that record or correct the ATen functions that run under them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordingMode(TorchDispatchMode):
    """Records the functions that are called; under it ops use their registered path."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function)
        return function(*args, **(kwargs or {}))


class LargestResult(TorchDispatchMode):
    """Record the element count of the largest result of any op."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return results


class ExactSoftmaxBackward(TorchDispatchMode):
    """Softmax's backward without the cancellation at the largest probability.

    There ``p (dp - sum(p dp))`` is the sum of all other keys' gradients. If these are below one ulp
    of dp, the result is 0 even in float64, so it could not serve as a reference.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._softmax_backward_data.default:
            dp, p, dim = args[:3]
            dp = dp - dp.gather(dim, p.argmax(dim, keepdim=True)).nan_to_num(0, 0, 0)
            args = (dp, p, *args[2:])
        return function(*args, **(kwargs or {}))
