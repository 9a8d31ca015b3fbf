"""Tiny Qwen3-VL and LLaVA-OneVision models, with batches of images, videos, both or neither."""

import copy

import torch

import vlm_fast
from tests.support.tiny_models import END, IMAGE, START, VIDEO, build

FRAMES = 2
BOTH = ("picture", "video")


def qwen3(*kinds):
    """One row with an image and a video in this order, one of them, or only text."""
    ids, given = [5, 6], {}
    generator = torch.Generator().manual_seed(len(kinds) + 7 * ("video" in kinds[:1]))
    for kind in kinds:
        if kind == "picture":
            ids += [START, *[IMAGE] * 4, END]
            given["pixel_values"] = torch.randn(16, 96, generator=generator)
            given["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        else:
            for _ in range(FRAMES):
                ids += [40, START, *[VIDEO] * 4, END]
            given["pixel_values_videos"] = torch.randn(32, 96, generator=generator)
            given["video_grid_thw"] = torch.tensor([[FRAMES, 4, 4]])
        ids.append(8)
    return _row(ids, given, 9 - len(kinds))


def onevision(*kinds):
    """Inputs of LLaVA-OneVision, whose images have tiles and a newline after each row."""
    ids, given = [5, 6], {}
    generator = torch.Generator().manual_seed(len(kinds) + 7 * ("video" in kinds[:1]))
    for kind in kinds:
        if kind == "picture":
            ids += [*[IMAGE] * 52]
            given["pixel_values"] = torch.randn(1, 3, 3, 16, 16, generator=generator)
            given["image_sizes"] = torch.tensor([[16, 32]])
        else:
            ids += [*[VIDEO] * 9]
            given["pixel_values_videos"] = torch.randn(1, 2, 3, 16, 16, generator=generator)
        ids.append(8)
    return _row(ids, given, 9 - len(kinds))


def _row(ids, given, more):
    row = torch.tensor([[*ids, *range(20, 20 + more)]])
    given |= {"input_ids": row, "attention_mask": torch.ones_like(row)}
    given["mm_token_type_ids"] = (row == IMAGE).long() + 2 * (row == VIDEO).long()
    return given | {"labels": row.masked_fill(row > 90, -100)}


BATCHES = {"qwen3_vl": qwen3, "llava_onevision": onevision}


def batch_of(name, kinds):
    given = BATCHES[name](*kinds)
    if name == "llava_onevision":
        del given["mm_token_type_ids"]
    return given


def plain_and_patched(name):
    model, _ = build(name)
    fast = copy.deepcopy(model)
    vlm_fast.patch(fast)
    return model, fast
