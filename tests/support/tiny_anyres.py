"""Small models whose images come in tiles, two images cut into different grids."""

import torch
import transformers

from tests.support.tiny_models import IMAGE, SIGLIP, TEXT, build
from vlm_fast.ops import anyres_tiling

TILE, SIDE = 16, 4  # of the tiny towers
PINPOINTS = [[TILE * i, TILE * j] for i in range(1, 10) for j in range(1, 10) if i * j <= 9]
SIZES = [[33, 47], [16, 55]]


def granite():
    """Since transformers 5.18 Q-Former heads have width 64 and it is as wide as the tower."""
    torch.manual_seed(0)
    qformer = transformers.Blip2QFormerConfig(
        hidden_size=64, encoder_hidden_size=64, num_attention_heads=1, intermediate_size=32,
        num_hidden_layers=1, cross_attention_frequency=1,
    )  # fmt: skip
    config = transformers.Granite4VisionConfig(
        vision_config=SIGLIP | dict(hidden_size=64),
        text_config=dict(TEXT, model_type="granite4_vision_text"),
        qformer_config=qformer, downsample_rate="1/2", deepstack_layer_map=[[-1, 0]],
        spatial_target_layers=[1, 1, 1, 1], image_grid_pinpoints=PINPOINTS,
        image_token_index=IMAGE, vision_feature_select_strategy="full",
    )  # fmt: skip
    return transformers.Granite4VisionForConditionalGeneration(config).eval()


def tiling_model(name):
    """A tiny model whose images come in tiles, and the side of a tile in tokens."""
    if name == "granite4_vision":
        return granite(), SIDE // 2
    model, _ = build(name)
    model.config.image_grid_pinpoints = PINPOINTS
    return model, SIDE


def ragged(name):
    """A tiny model whose two images are cut into different grids, and its inputs."""
    model, side = tiling_model(name)
    ids = torch.randint(3, 90, (2, 140))
    for row, size in zip(ids, SIZES, strict=True):
        row[4 : 4 + counted(size, side)] = IMAGE
    return model, {"input_ids": ids} | tiled(SIZES, side)


def several():
    """A OneVision model with two images in one row, which are not tiled, and one that is."""
    model, _ = build("llava_onevision")
    model.config.image_grid_pinpoints = PINPOINTS
    ids = torch.randint(3, 90, (2, 48))
    ids[0, 2:19] = ids[0, 21:38] = IMAGE
    ids[1, 5 : 5 + counted([TILE, TILE])] = IMAGE
    inputs = {"input_ids": ids} | tiled([[TILE, TILE]] * 3)
    return model, inputs | {"batch_num_images": torch.tensor([2, 1])}


def counted(size, side=SIDE):
    return anyres_tiling.token_count(size, anyres_tiling.Tiling(PINPOINTS, TILE, side))


def tiled(sizes, side=SIDE):
    tiling = anyres_tiling.Tiling(PINPOINTS, TILE, side)
    tiles = [anyres_tiling.tile_count(tuple(size), tiling) for size in sizes]
    pixels = torch.randn(len(sizes), max(tiles), 3, TILE, TILE)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
