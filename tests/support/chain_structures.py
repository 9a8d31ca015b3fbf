"""Projectors and MLPs in the forms of published code, in plain PyTorch: see `STRUCTURES`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HIDDEN = 16, 48


def mlp(depth, width=WIDTH, hidden=HIDDEN, act=nn.GELU):
    """LLaVA's ``mlpNx_gelu``."""
    children = [nn.Linear(width, hidden)]
    for _ in range(1, depth):
        children += [act(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*children)


class SimpleResBlock(nn.Module):
    """LLaVA's, behind the linears of ``mlp2x_res2x_gelu``."""

    def __init__(self, channels):
        super().__init__()
        self.pre_norm = nn.LayerNorm(channels)
        self.proj = nn.Sequential(
            nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    def forward(self, x):
        x = self.pre_norm(x)
        return x + self.proj(x)


class DownSampleBlock(nn.Module):
    """VILA's: concatenates blocks of 2 x 2 tokens; the package does not know this module."""

    def forward(self, x):
        rows, tokens, width = x.shape
        side = int(tokens**0.5)
        x = x.reshape(rows, side // 2, 2, side // 2, 2, width).transpose(2, 3)
        return x.reshape(rows, tokens // 4, 4 * width)


class PrismaticProjector(nn.Module):
    """OpenVLA's, of one vision backbone or of two."""

    def __init__(self, use_fused_vision_backbone):
        super().__init__()
        self.use_fused_vision_backbone = use_fused_vision_backbone
        self.vision_dim, self.llm_dim = WIDTH, HIDDEN
        wide = 4 * WIDTH
        self.fc1 = nn.Linear(WIDTH, wide if use_fused_vision_backbone else HIDDEN)
        self.fc2 = nn.Linear(self.fc1.out_features, HIDDEN)
        self.act_fn1 = nn.GELU()
        if use_fused_vision_backbone:
            self.fc3 = nn.Linear(HIDDEN, HIDDEN)
            self.act_fn2 = nn.GELU()

    def forward(self, img_patches):
        if not self.use_fused_vision_backbone:
            projected_features = self.fc1(img_patches)
            projected_features = self.act_fn1(projected_features)
            projected_features = self.fc2(projected_features)
        else:
            projected_features = self.fc1(img_patches)
            projected_features = self.act_fn1(projected_features)
            projected_features = self.fc2(projected_features)
            projected_features = self.act_fn2(projected_features)
            projected_features = self.fc3(projected_features)
        return projected_features


class TimmMlp(nn.Module):
    """timm's, in all its towers."""

    def __init__(self, drop=0.0, norm_layer=None):
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, WIDTH)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        return self.drop2(x)


class FunctionalMlp(nn.Module):
    """An MLP with functional activations, one of them an attribute, and functional dropout."""

    def __init__(self, p=0.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.out, self.act, self.p = nn.Linear(HIDDEN, WIDTH), F.silu, p

    def forward(self, x):
        x = F.gelu(self.fc1(x), approximate="tanh")
        x = F.dropout(self.act(self.fc2(x)), p=self.p, training=self.training)
        return self.out(x)


class QuickGELU(nn.Module):
    """CLIP's and EVA's, written out."""

    def forward(self, x: torch.Tensor):
        return x * torch.sigmoid(1.702 * x)


class MolmoGELU(nn.GELU):
    """Molmo's: a subclass of GELU that adds a property and keeps forward."""

    @property
    def output_multiplier(self):
        return 1.0


class NamedMlp(nn.Module):
    """An MLP like transformers' CLIPMLP with any activation."""

    def __init__(self, act):
        super().__init__()
        self.activation_fn = act
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, hidden_states):
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class Structure(NamedTuple):
    """A module, the shape of its input, and the names of what is patched in it.

    Attributes:
        less: whether the patched module saves fewer bytes for backward.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 9, WIDTH)
    patched: tuple[str, ...] = ("",)
    less: bool = True


STRUCTURES = {
    "LLaVA mlp2x": Structure(lambda: mlp(2)),
    "LLaVA mlp3x": Structure(lambda: mlp(3)),
    "mlp4x, SiLU": Structure(lambda: mlp(4, act=nn.SiLU)),
    "LLaVA mlp2x_res2x": Structure(
        lambda: nn.Sequential(*mlp(2), SimpleResBlock(HIDDEN), SimpleResBlock(HIDDEN)),
        patched=("", "3.proj", "4.proj"),
    ),
    "InternVL mlp1": Structure(
        lambda: nn.Sequential(nn.LayerNorm(4 * WIDTH), *mlp(2, 4 * WIDTH)), (2, 4, 4 * WIDTH)
    ),
    "NVLM mlp1": Structure(
        lambda: nn.Sequential(
            nn.RMSNorm(WIDTH), nn.Linear(WIDTH, HIDDEN, bias=False), nn.GELU(),
            nn.Linear(HIDDEN, WIDTH, bias=False),
        )
    ),
    "VILA mlp_downsample": Structure(
        lambda: nn.Sequential(DownSampleBlock(), nn.LayerNorm(4 * WIDTH), *mlp(2, 4 * WIDTH)),
        (2, 16, WIDTH),
    ),
    "Cambrian aux": Structure(lambda: nn.Sequential(*mlp(2), nn.LayerNorm(HIDDEN))),
    "MobileVLM": Structure(lambda: nn.Sequential(nn.Identity(), *mlp(2))),
    "honeybee readout": Structure(lambda: mlp(2, act=nn.SiLU)),
    "ReLU in place": Structure(lambda: mlp(3, act=lambda: nn.ReLU(inplace=True)), less=False),
    "norm before the activation": Structure(
        lambda: nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.LayerNorm(HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)
        )
    ),
    "Prismatic": Structure(lambda: PrismaticProjector(False)),
    "Prismatic, two backbones": Structure(lambda: PrismaticProjector(True)),
    "functional": Structure(FunctionalMlp),
    "timm Mlp": Structure(TimmMlp),
    "QuickGELU": Structure(lambda: NamedMlp(QuickGELU())),
    "a subclass of nn.GELU": Structure(lambda: NamedMlp(MolmoGELU())),
}  # fmt: skip
