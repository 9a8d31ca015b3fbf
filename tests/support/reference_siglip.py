"""A plain reference of SigLIP's loss, with all logits in memory and in one process."""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def loss_per_image(images, texts, scale, bias):
    """The loss of each image ``(batch,)``; the SigLIP loss is its mean."""
    logits = images @ texts.t() * scale + bias
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum(1)


class LargestResult(TorchDispatchMode):
    """Record the element count of the largest result of any op."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return results
