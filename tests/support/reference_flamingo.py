"""Flamingo's gated cross-attention in plain PyTorch, from the published formulas.

Flamingo, arXiv 2204.14198, sections 3.1.2 and 3.1.3, with the parameter names and the arguments of
OpenFlamingo: text attends to the latents of its last image, or of all images so far, through a mask
of text by all latents.
"""

import torch
from torch import nn


def feed_forward(dim, mult):
    wide = dim * mult
    layers = nn.Linear(dim, wide, bias=False), nn.GELU(), nn.Linear(wide, dim, bias=False)
    return nn.Sequential(nn.LayerNorm(dim), *layers)


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
        self.ff = feed_forward(dim, ff_mult)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, media, media_locations=None, use_cached_media=False):
        attended = self.attn(x, media, media_locations, use_cached_media)
        x = attended * self.attn_gate.tanh() + x
        return self.ff(x) * self.ff_gate.tanh() + x


class PerceiverAttention(nn.Module):
    def __init__(self, dim, dim_head=64, heads=8):
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        inner = dim_head * heads
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x, latents):
        latents = self.norm_latents(latents)
        keys = torch.cat((self.norm_media(x), latents), -2)
        q, (k, v) = self.to_q(latents) * self.scale, self.to_kv(keys).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2)
        weights = (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1)
        return self.to_out((weights @ v).transpose(-2, -3).flatten(-2))


class PerceiverResampler(nn.Module):
    """Sections 3.1.1 and A.1.1: latents attend to features and to themselves."""

    def __init__(
        self, dim, depth=6, dim_head=64, heads=8, num_latents=64, max_num_media=None,
        max_num_frames=None, ff_mult=4,
    ):  # fmt: skip
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = self.media_time_embs = None
        if max_num_frames:
            self.frame_embs = nn.Parameter(torch.randn(max_num_frames, dim))
        if max_num_media:
            self.media_time_embs = nn.Parameter(torch.randn(max_num_media, 1, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, dim_head, heads), feed_forward(dim, ff_mult)])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        batch, media, frames = x.shape[:3]
        if self.frame_embs is not None:
            x = x + self.frame_embs[:frames, None]
        x = x.flatten(2, 3)
        if self.media_time_embs is not None:
            x = x + self.media_time_embs[:media]
        latents = self.latents.expand(batch, media, -1, -1)
        for attention, ff in self.layers:
            latents = attention(x, latents) + latents
            latents = ff(latents) + latents
        return self.norm(latents)
