"""An exact backward of softmax for float64 references."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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
