"""A small module of each family, with inputs for any number of images."""

import torch
from torch import nn

from tests.support import tiny_qformers
from vlm_fast.modules import (
    GatedCrossAttentionBlock,
    MLPProjector,
    PerceiverResampler,
    QFormer,
    SequentialProjector,
)

SMALL = {name: size for name, size in tiny_qformers.SMALL.items() if name != "vocab_size"}
CONNECTORS = {
    "projector": (lambda: MLPProjector(12, 20, 8), lambda n: (torch.randn(n, 5, 12),)),
    "deep projector": (
        lambda: SequentialProjector(12, 20, 8, depth=3), lambda n: (torch.randn(n, 5, 12),)
    ),
    "Q-Former": (
        lambda: QFormer(**SMALL).eval(),
        lambda n: (torch.randn(n, 5, 48), None, None, torch.randn(n, 17, 40)),
    ),
    "resampler": (
        lambda: PerceiverResampler(dim=24, depth=2, dim_head=16, heads=2, num_latents=4),
        lambda n: (torch.randn(n, 2, 1, 9, 24),),
    ),
    "gated block": (
        lambda: open_gates(GatedCrossAttentionBlock(dim=24, dim_visual=12, dim_head=8, heads=2)),
        lambda n: (torch.randn(n, 7, 24), torch.randn(n, 2, 3, 12)),
    ),
}  # fmt: skip


def open_gates(block):
    for gate in (block.attn_gate, block.ff_gate):
        gate.data.fill_(0.5)
    return block


class WithHead(nn.Module):
    def __init__(self, connector):
        super().__init__()
        self.connector, self.head = connector, nn.LazyLinear(3)

    def forward(self, *given):
        y = self.connector(*given)
        return self.head(getattr(y, "last_hidden_state", y))
