"""Kinds of prompts, patched against unpatched: padding, chunks, beams, several or no images."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import vlm_fast
from tests.support import tiny_flamingos, tiny_qformers
from tests.support.tiny_models import END, IMAGE, SIGLIP, START, VIDEO, build
from tests.support.whole_models import assert_close, step, with_labels
from vlm_fast.ops import anyres_tiling


def pair_of(model):
    """The model and a patched copy of it."""
    fast = copy.deepcopy(model)
    vlm_fast.patch(fast)
    return model, fast


def text_of(model, given, **options):
    """Three generated tokens per row."""
    return model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False, **options)


def trained_alike(plain, fast, given):
    with vlm_fast.strict():
        ours = step(fast, given)
    assert_close(ours, step(plain, given))
    assert all(reason is None for reason in vlm_fast.explain(fast).values())


def labelled(given):
    ids = given["input_ids"]
    return given | {"labels": ids.masked_fill(ids > 90, -100)}


def left_padded(given, by=3):
    """The rows with pad tokens on the left, one more in the second row."""
    names = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"} & given.keys()
    return given | {
        name: torch.stack([F.pad(row, (by + i, 1 - i)) for i, row in enumerate(given[name])])
        for name in names
    }


def padded(rows):
    """Ids of rows of different lengths with pad tokens on the right, and their mask."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


LEFT = ["llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl", "gemma3",
        "mistral3", "idefics3", "aria"]  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left_padding(name):
    model, given = build(name)
    plain, fast = pair_of(model)
    padded = left_padded(given)
    trained_alike(plain, fast, labelled(padded))
    assert torch.equal(text_of(fast, padded), text_of(plain, padded))


@pytest.mark.parametrize("name", ["idefics", "mllama", *tiny_qformers.FAMILIES])
def test_left_padding_of_other_models(name):
    model, given = others(name)
    plain, fast = pair_of(model)
    given["attention_mask"][1, :2] = 0
    assert torch.equal(text_of(fast, given), text_of(plain, given))


def others(name):
    if name in tiny_qformers.FAMILIES:
        return tiny_qformers.whole(name)
    return getattr(tiny_flamingos, name)(), getattr(tiny_flamingos, f"{name}_inputs")()


# ---- embeddings of the caller ----


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl", "gemma3", "llava_next"])
def test_inputs_embeds_as_a_leaf_with_gradients(name):
    """The leaf is not written to; its gradient is zero at placeholders."""
    model, given = build(name)
    ids = given.pop("input_ids")
    if name == "llava_next":  # one tile, so that all placeholders are found by their embedding
        given.pop("attention_mask")
    found = []
    for one in pair_of(model):
        embeds = one.get_input_embeddings()(ids).detach().requires_grad_()
        before = embeds.detach().clone()
        output = one(**given, inputs_embeds=embeds)
        output.logits.square().sum().backward()
        assert torch.equal(embeds, before)
        assert not embeds.grad[ids == IMAGE].any() and embeds.grad[ids < 90].any()
        found.append({"logits": output.logits.detach(), "gradient": embeds.grad})
    assert_close(found[1], found[0])


# ---- chunked prompts ----


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl", "gemma3", "idefics3"])
@pytest.mark.parametrize("after", ["the picture", "a prefix of text"])
def test_chunked_prefill(name, after):
    """Text after a cached image, and an image after cached text."""
    model, given = build(name)
    ids = given["input_ids"]
    first_picture = int((ids == START).nonzero()[:, 1].max())
    end = int((ids == END).nonzero()[:, 1].max()) + 1
    at = end if after == "the picture" else min(1, first_picture)
    pictures = {n: v for n, v in given.items() if v.is_floating_point() or "grid" in n}
    kinds = {"mm_token_type_ids", "token_type_ids"} & given.keys()
    results = []
    for one in pair_of(model):
        chunks = [(0, at), (at, ids.shape[1])]
        cache, logits = None, []
        for start, stop in chunks:
            shown = pictures if (start == 0) == (after == "the picture") else {}
            typed = {n: given[n][:, start:stop] for n in kinds}
            if "qwen" in name:  # it cannot compute them for part of a prompt
                typed["position_ids"] = torch.arange(start, stop).expand(3, len(ids), -1)
            with torch.no_grad():
                output = one(
                    input_ids=ids[:, start:stop], attention_mask=torch.ones_like(ids[:, :stop]),
                    past_key_values=cache, use_cache=True, **shown, **typed,
                )  # fmt: skip
            cache = output.past_key_values
            logits.append(output.logits)
        results.append({"first": logits[0], "second": logits[1]})
    assert_close(results[1], results[0])


@pytest.mark.parametrize("name", ["mllama", "idefics"])
def test_generation_with_chunked_prefill(name):
    model, given = others(name)
    plain, fast = pair_of(model)
    for chunk in (4, 7):
        texts = [text_of(m, given, prefill_chunk_size=chunk) for m in (plain, fast)]
        assert torch.equal(*texts)


# ---- beams ----


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl of images", "llava_next"])
def test_beam_search_with_several_grids(name):
    model, given = build(name)
    plain, fast = pair_of(model)
    texts = [text_of(m, given, num_beams=3, num_return_sequences=2) for m in (plain, fast)]
    assert torch.equal(*texts) and len(texts[0]) == 4


# ---- different numbers of images ----


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl", "gemma3"])
def test_rows_with_two_zero_and_one_images(name):
    model, given = build(name)
    plain, fast = pair_of(model)
    count = int((given["input_ids"][0] == IMAGE).sum())
    picture = [START, *[IMAGE] * count, END]
    rows = [[5, *picture, 6, *picture, 7], [8, 9, 10], [11, *picture, 12]]
    batch = padded(rows)
    ids = batch["input_ids"]
    if "image_grid_thw" in given:
        batch["image_grid_thw"] = given["image_grid_thw"][[0, 1, 0]]
        batch["pixel_values"] = torch.randn(48, given["pixel_values"].shape[1])
    else:
        batch["pixel_values"] = torch.randn(3, 3, 16, 16)
    for types in {"mm_token_type_ids", "token_type_ids"} & given.keys():
        batch[types] = (ids == IMAGE).long()
    trained_alike(plain, fast, labelled(batch))
    assert torch.equal(text_of(fast, batch), text_of(plain, batch))


@pytest.mark.parametrize("name", ["mllama", "idefics"])
def test_row_without_an_image(name):
    """The mask of this row hides all images; the other row is unchanged."""
    model, given = others(name)
    plain, fast = pair_of(model)
    if name == "mllama":
        for hidden in ("cross_attention_mask", "aspect_ratio_mask"):
            given[hidden][1] = 0
        given["aspect_ratio_ids"][1] = 0
    else:
        given["image_attention_mask"][1] = 0
    given["pixel_values"][1] = 0
    trained_alike(plain, fast, with_labels(given))
    assert torch.equal(text_of(fast, given), text_of(plain, given))


@pytest.mark.parametrize("grids", [[[1, 2, 6], [3, 2, 2]], [[3, 6, 2], [1, 2, 2]]])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "exaone4_5"])
def test_videos_with_odd_grids(name, grids):
    """Odd numbers of frames and blocks, with another grid in each row."""
    model, given = build(name)
    plain, fast = pair_of(model)
    width = given["pixel_values_videos"].shape[1]
    rows = []
    for frames, height, across in grids:
        tokens = height * across // 4
        if "qwen3" in name:  # each frame is separate, with a timestamp before it
            shown = [t for _ in range(frames) for t in (40, START, *[VIDEO] * tokens, END)]
        else:
            shown = [START, *[VIDEO] * (frames * tokens), END]
        rows.append([5, *shown, 6])
    patches = sum(f * h * w for f, h, w in grids)
    videos = {"pixel_values_videos": torch.randn(patches, width)}
    batch = padded(rows) | videos | {"video_grid_thw": torch.tensor(grids)}
    for types in {"mm_token_type_ids", "token_type_ids"} & given.keys():
        batch[types] = 2 * (batch["input_ids"] == VIDEO).long()
    trained_alike(plain, fast, labelled(batch))


# ---- OneVision ----


def onevision(**config):
    model, _ = build("llava_onevision")
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


def test_onevision_batch_with_one_and_two_images_per_row():
    """Several images in a row have one tile each; a single image has a grid."""
    model = onevision()
    plain, fast = pair_of(model)
    side = SIGLIP["image_size"] // SIGLIP["patch_size"]
    tiling = anyres_tiling.Tiling(model.config.image_grid_pinpoints, SIGLIP["image_size"], side, 9)
    sizes = torch.tensor([[16, 32], [20, 16], [16, 16]])
    grid_count = anyres_tiling.token_count(sizes[0], tiling)
    tiled = anyres_tiling.tile_count(tuple(sizes[0].tolist()), tiling)
    one = anyres_tiling.token_count(sizes[1], tiling, tiles=1)
    rows = [[5, *[IMAGE] * grid_count, 6], [7, *[IMAGE] * one, 8, *[IMAGE] * one, 9]]
    pictures = {"pixel_values": torch.randn(3, tiled, 3, 16, 16), "image_sizes": sizes}
    batch = padded(rows) | pictures | {"batch_num_images": torch.tensor([1, 2])}
    trained_alike(plain, fast, labelled(batch))
    assert torch.equal(text_of(fast, batch), text_of(plain, batch))


@pytest.mark.parametrize("most", [1, 2, 9])
def test_maximum_tile_count_follows_config(most):
    model = onevision(
        vision_aspect_ratio=f"anyres_max_{most}",
        image_grid_pinpoints=[[16 * i, 16 * j] for i in range(1, 4) for j in range(1, 4)],
    )
    plain, fast = pair_of(model)
    side = SIGLIP["image_size"] // SIGLIP["patch_size"]
    size = torch.tensor([[44, 48]])
    tiling = anyres_tiling.Tiling(model.config.image_grid_pinpoints, 16, side, most)
    count = anyres_tiling.token_count(size[0], tiling)
    tiles = anyres_tiling.tile_count((44, 48), tiling)
    ids = torch.tensor([[5, *[IMAGE] * count, 6]])
    batch = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), image_sizes=size,
        pixel_values=torch.randn(1, tiles, 3, 16, 16),
    )  # fmt: skip
    trained_alike(plain, fast, labelled(batch))
    packed = {n for n, c in vlm_fast.stats().items() if "anyres_pack" in n and c["fast"]}
    assert packed == {"anyres_pack_resized" if most < 9 else "anyres_pack"}
