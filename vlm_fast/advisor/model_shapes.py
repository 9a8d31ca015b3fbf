"""Shapes of published vision-language models: a vision encoder and a language model.

Each says where its numbers are from: "config" is the default of that config class in transformers
5.17, "card" is the published checkpoint's config.json, quoted from memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionTower:
    """A vision encoder as the connector sees it.

    Attributes:
        width: features per token given to the connector.
        side: patches along a side of an image, or of one of its tiles.
        tokens: per tile for connectors that need no grid; includes a CLS token if the model passes
            it on.
        hidden, layers, intermediate: of its transformer, to compute its weights.
        tiles: per image; 1 without tiling.
    """

    width: int
    side: int
    tokens: int
    hidden: int
    layers: int
    intermediate: int
    tiles: int = 1

    @property
    def patches(self) -> int:
        """Patches of an image over all tiles."""
        return self.tiles * self.side**2


@dataclass(frozen=True)
class LanguageModel:
    """A decoder with Llama's layers, or OPT's if ``gated`` is False.

    Attributes:
        hidden, layers, heads, kv_heads, head_dim, intermediate: as in Llama.
        vocabulary: rows of the embedding.
        context: maximal sequence length in tokens.
        tied: whether the head shares the embedding's matrix.
        gated: whether the feed-forward network has three matrices (SwiGLU) or two.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int
    tied: bool = False
    gated: bool = True


@dataclass(frozen=True)
class ModelShape:
    """The shapes of a model.

    Attributes:
        title: name in prose.
        tower: its vision encoder.
        language: its language model.
        connector: name of the connector that it was published with.
        source: where the numbers are from.
    """

    title: str
    tower: VisionTower
    language: LanguageModel
    connector: str
    source: str


CLIP_L = VisionTower(width=1024, side=24, tokens=576, hidden=1024, layers=24, intermediate=4096)
EVA_G = VisionTower(width=1408, side=16, tokens=257, hidden=1408, layers=39, intermediate=6144)
VICUNA_7B = LanguageModel(
    hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, intermediate=11008,
    vocabulary=32064, context=4096,
)  # fmt: skip
VICUNA_13B = LanguageModel(
    hidden=5120, layers=40, heads=40, kv_heads=40, head_dim=128, intermediate=13824,
    vocabulary=32064, context=4096,
)  # fmt: skip
QWEN2_7B = LanguageModel(
    hidden=3584, layers=28, heads=28, kv_heads=4, head_dim=128, intermediate=18944,
    vocabulary=152064, context=32768,
)  # fmt: skip

MODELS = {
    "llava-1.5-7b": ModelShape(
        "LLaVA-1.5-7B", CLIP_L, VICUNA_7B, "mlp",
        "LlavaConfig; vocabulary and context: card; arXiv 2310.03744",
    ),
    "llava-1.5-13b": ModelShape(
        "LLaVA-1.5-13B", CLIP_L, VICUNA_13B, "mlp", "card; arXiv 2310.03744"
    ),
    "llava-next-7b": ModelShape(
        "LLaVA-NeXT-7B", CLIP_L, VICUNA_7B, "anyres", "LlavaNextConfig; vocabulary, context: card"
    ),
    "llava-onevision-7b": ModelShape(
        "LLaVA-OneVision-7B",
        VisionTower(width=1152, side=27, tokens=729, hidden=1152, layers=26, intermediate=4304),
        QWEN2_7B, "anyres", "tower: LlavaOnevisionConfig; Qwen2-7B: card; arXiv 2408.03326",
    ),
    "blip2-opt-2.7b": ModelShape(
        "BLIP-2 OPT-2.7B", EVA_G,
        LanguageModel(
            hidden=2560, layers=32, heads=32, kv_heads=32, head_dim=80, intermediate=10240,
            vocabulary=50304, context=2048, tied=True, gated=False,
        ),
        "qformer", "tower: Blip2Config; OPT-2.7B: card; arXiv 2301.12597",
    ),
    "instructblip-7b": ModelShape(
        "InstructBLIP Vicuna-7B", EVA_G,
        LanguageModel(
            hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, intermediate=11008,
            vocabulary=32001, context=2048,
        ),
        "qformer", "tower: InstructBlipConfig; Vicuna-7B: card; arXiv 2305.06500",
    ),
    "idefics-9b": ModelShape(
        "IDEFICS-9B",
        VisionTower(width=1280, side=16, tokens=257, hidden=1280, layers=32, intermediate=5120),
        LanguageModel(
            hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, intermediate=11008,
            vocabulary=32002, context=2048,
        ),
        "gated", "language model: IdeficsConfig; tower CLIP-H/14: card",
    ),
    "llama-3.2-11b-vision": ModelShape(
        "Llama-3.2-11B-Vision",
        VisionTower(
            width=7680, side=40, tokens=1601, hidden=1280, layers=40, intermediate=5120, tiles=4
        ),
        LanguageModel(
            hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14336,
            vocabulary=128256, context=131072,
        ),
        "gated", "MllamaConfig without its 8 cross-attention layers; 560 pixels, 4 tiles: card",
    ),
    "qwen2.5-vl-7b": ModelShape(
        "Qwen2.5-VL-7B at 448 pixels",
        VisionTower(width=1280, side=32, tokens=1024, hidden=1280, layers=32, intermediate=3420),
        LanguageModel(
            hidden=3584, layers=28, heads=28, kv_heads=4, head_dim=128, intermediate=18944,
            vocabulary=152064, context=128000,
        ),
        "shuffle", "depth and intermediate of the tower: Qwen2_5_VLConfig; the rest: card",
    ),
    "internvl3-8b": ModelShape(
        "InternVL3-8B, one tile",
        VisionTower(width=1024, side=32, tokens=1024, hidden=1024, layers=24, intermediate=4096),
        QWEN2_7B, "shuffle", "tower: InternVLConfig; Qwen2.5-7B: card",
    ),
}  # fmt: skip


def model_shape(name: str) -> ModelShape:
    """The shape with this name.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if name not in MODELS:
        raise ValueError(f"no model shape is called {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]
