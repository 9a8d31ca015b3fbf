"""Flamingo's gated cross-attention in plain PyTorch, written from its published formulas.

Flamingo, arXiv 2204.14198, sections 3.1.2 and 3.1.3, with the parameter names and the arguments of
OpenFlamingo: text attends to the latents of its last image, or of all images so far, through a mask
of text by all latents.
"""

import torch
from torch import nn


class MaskedCrossAttention(nn.Module):
    def __init__(self, dim, dim_visual, dim_head=64, heads=8, only_attend_immediate_media=True):
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.only_attend_immediate_media = only_attend_immediate_media
        inner = dim_head * heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim_visual, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x, media, media_locations=None, use_cached_media=False):
        batch, tokens, _ = x.shape
        images, latents = media.shape[1:3]
        q = self.to_q(self.norm(x)) * self.scale
        k, v = self.to_kv(media.flatten(1, 2)).chunk(2, -1)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(2, 3)
        if media_locations is not None:
            if use_cached_media:
                seen = media_locations.sum(1, keepdim=True).expand(batch, tokens)
            else:
                seen = media_locations.cumsum(1)
            number = torch.arange(images, device=x.device).repeat_interleave(latents) + 1
            seen = seen[:, None, :, None]
            shown = seen == number if self.only_attend_immediate_media else seen >= number
            scores = scores.masked_fill(~shown, -torch.finfo(scores.dtype).max)
        weights = (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1)
        if media_locations is not None and self.only_attend_immediate_media:
            weights = weights.masked_fill(seen == 0, 0)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class GatedCrossAttentionBlock(nn.Module):
    def __init__(self, dim, dim_visual, dim_head=64, heads=8, ff_mult=4, **options):
        super().__init__()
        self.attn = MaskedCrossAttention(dim, dim_visual, dim_head, heads, **options)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, dim * ff_mult, bias=False),
            nn.GELU(),
            nn.Linear(dim * ff_mult, dim, bias=False),
        )
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, media, media_locations=None, use_cached_media=False):
        attended = self.attn(x, media, media_locations, use_cached_media)
        x = attended * self.attn_gate.tanh() + x
        return self.ff(x) * self.ff_gate.tanh() + x
