"""AnyRes tiles packed by ops, module and patches, against transformers' ``pack_image_features``."""

import copy
import functools

import pytest
import torch

import vlm_fast
from tests.support.cases import assert_right
from tests.support.tiny_anyres import PINPOINTS, SIDE, TILE
from tests.support.tiny_models import build
from vlm_fast import ops
from vlm_fast.modules import AnyResPacker
from vlm_fast.modules.anyres_packer import concatenated
from vlm_fast.ops import anyres_plan, anyres_tiling
from vlm_fast.patching.models import anyres_result
from vlm_fast.verification import tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Wide, high and square, of one to nine tiles, and rounding edges.
SIZES = [
    (16, 16), (16, 32), (40, 16), (16, 55), (32, 32), (50, 20), (20, 50), (33, 47), (48, 48),
    (45, 37), (144, 16), (16, 144), (17, 120), (100, 14), (31, 90), (3, 5),
]  # fmt: skip


def model_of(name):
    model, _ = build(name)
    model.model.config.image_grid_pinpoints = PINPOINTS
    return model.model


def packed(model, parts, sizes, newline, **options):
    """Packed rows of all images and their counts, from the model's method."""
    if "onevision" not in type(model).__module__:
        options["vision_feature_select_strategy"] = "full"
    images, counts = model.pack_image_features(parts, sizes, image_newline=newline, **options)
    assert counts.dtype == torch.long and counts.tolist() == [len(image) for image in images]
    return torch.cat(images), counts


def results(model, features, tiles, sizes, newline, **options):
    """Packed rows, and gradients of features and newline."""

    def run(features, newline):
        # Features of a projector: not a leaf, and split as the models split them.
        parts = torch.split(features * 1, tiles, dim=0)
        return packed(model, parts, sizes, newline, **options)[0]

    outputs, gradients = tolerance.outputs_and_gradients(run, (features, newline), {})
    return dict(zip(("rows", "features", "newline"), [*outputs, *gradients], strict=True))


def batches():
    generator = torch.Generator().manual_seed(0)
    for count in (1, 1, 2, 3, 5, 8):
        picked = torch.randint(0, len(SIZES), (count,), generator=generator).tolist()
        yield [SIZES[i] for i in picked], picked
    yield SIZES, list(range(len(SIZES)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name, options",
    [
        ("llava_next", {}),
        ("llava_next_video", {}),
        ("llava_onevision", {}),
        ("llava_onevision", {"vision_aspect_ratio": "anyres_max_2"}),
        ("llava_onevision", {"vision_aspect_ratio": "anyres_max_5"}),
    ],
    ids=["next", "next video", "onevision", "onevision, max 2", "onevision, max 5"],
)
def test_packed_rows_and_gradients_match_transformers(name, options, dtype):
    plain = model_of(name)
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast)
    tiling = anyres_tiling.Tiling(PINPOINTS, TILE, SIDE)
    for sizes, seeds in batches():
        torch.manual_seed(seeds[0])
        # Every third image is shown as one tile.
        tiles = [
            1 if s % 3 == 2 else anyres_tiling.tile_count(z, tiling)
            for s, z in zip(seeds, sizes, strict=True)
        ]
        features = torch.randn(sum(tiles), SIDE**2, 24, dtype=dtype)
        newline = torch.randn(24, dtype=dtype)
        arguments = tiles, torch.tensor(sizes)
        with vlm_fast.strict():
            ours = results(fast, features, *arguments, newline, **options)
        exact = results(plain, features.double(), *arguments, newline.double(), **options)
        native = functools.partial(results, plain, features, *arguments, newline, **options)
        assert_right(ours, native, exact, "rows")
    called = {name for name, counts in vlm_fast.stats().items() if counts["fast"]}
    assert ("anyres_pack_resized" in called) == bool(options)
    assert "anyres_pack" in called


def test_copied_rows_are_bitwise_equal():
    plain, tiles = model_of("llava_next"), [5, 1]
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast)
    features, newline = torch.randn(6, 16, 24), torch.randn(24)
    for sizes in (torch.tensor([[32, 20], [5, 5]]), [[32, 20], [5, 5]], [(32, 20), (5, 5)]):
        both = [packed(m, features.split(tiles), sizes, newline) for m in (fast, plain)]
        assert torch.equal(both[0][0], both[1][0]) and torch.equal(both[0][1], both[1][1])
    both = [packed(m, features.split(tiles), sizes, None)[0] for m in (fast, plain)]
    assert torch.equal(*both)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("images", [1, 2, 4])
def test_large_rows_in_threads(images, threads):
    """Sizes at which the compiled code uses threads, non-temporal stores and huge pages."""
    tiling = anyres_tiling.Tiling([[24, 24], [48, 48]], 24, 24)
    plan = anyres_plan.plan([(48, 40)] * images, tiling)
    features = torch.randn(5 * images, 576, 2047, dtype=torch.bfloat16, requires_grad=True)
    newline = torch.randn(2047, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = ops.anyres_pack(features, newline, *plan.tables)
        gradient = torch.autograd.grad(ours, features, ours)[0]
    finally:
        torch.set_num_threads(before)
    theirs = ops.anyres_pack.reference(features, newline, *plan.tables)
    assert torch.equal(ours, theirs)
    assert torch.equal(gradient, torch.autograd.grad(theirs, features, ours)[0])


# ---- the module ----


@pytest.mark.parametrize("max_tiles", [None, 2])
@pytest.mark.parametrize("newline", [True, False])
def test_module_packs_and_merges(newline, max_tiles):
    tiling = anyres_tiling.Tiling(PINPOINTS, TILE, SIDE, max_tiles, newline)
    packer = AnyResPacker(24, tiling)
    assert list(packer.state_dict()) == ["image_newline"] * newline
    sizes = [(33, 47), (16, 55)]
    plan = packer.plan(torch.tensor(sizes))
    assert plan.counts == tuple(anyres_tiling.token_count(size, tiling) for size in sizes)
    assert plan.is_resized == (max_tiles is not None)
    tiles = [anyres_tiling.tile_count(size, tiling) for size in sizes]
    features = torch.randn(sum(tiles), SIDE**2, 24, requires_grad=True)
    rows = packer(features, plan)
    assert torch.equal(packer(features.split(tiles), plan), rows)
    assert torch.equal(rows[: SIDE**2], features[0])
    length = max(plan.counts) + 3
    mask = torch.stack([torch.arange(length) < n for n in plan.counts])
    embeds = torch.randn(2, length, 24, requires_grad=True)
    wanted = [embeds, features, *packer.parameters()]
    upstream = torch.randn(2, length, 24)
    merged = packer.merge(embeds, features, plan, mask)
    expected = embeds.masked_scatter(mask.unsqueeze(-1), rows)
    assert torch.equal(merged, expected)
    for ours, theirs in zip(
        torch.autograd.grad(merged, wanted, upstream, retain_graph=True),
        torch.autograd.grad(expected, wanted, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_merge_checks_slot_count():
    packer = AnyResPacker(24, anyres_tiling.Tiling(PINPOINTS, TILE, SIDE))
    plan = packer.plan([(16, 16)])
    features, mask = torch.randn(2, 16, 24), torch.zeros(1, 99, dtype=torch.bool)
    mask[0, : plan.counts[0] - 1] = True
    with pytest.raises(ValueError, match="source has 36 rows, expected 35"):
        packer.merge(torch.zeros(1, 99, 24), features, plan, mask)


def test_prepared_plan_compiles_to_one_graph():
    packer = AnyResPacker(24, anyres_tiling.Tiling(PINPOINTS, TILE, SIDE))
    plan, features = packer.plan([(32, 20)]), torch.randn(5, 16, 24)
    compiled = torch.compile(packer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features, plan), packer(features, plan))


# ---- split features are neither copied nor bypassed in backward ----


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


@pytest.mark.parametrize("requires_grad", [False, True])
def test_split_parts_are_not_copied(requires_grad):
    x = torch.randn(6, 4, 8, requires_grad=requires_grad) * 1
    whole = concatenated(x.split([2, 1, 3]))
    assert whole.data_ptr() == x.data_ptr() and torch.equal(whole, x)
    assert whole.requires_grad == requires_grad
    with torch.inference_mode():
        x = torch.randn(6, 4, 8)
        assert concatenated(x.split([2, 4])).data_ptr() == x.data_ptr()
        assert concatenated(x.split([2, 4])[:1]).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("tokens", [2, 4])
@pytest.mark.parametrize("images", [2, 3])
def test_single_tile_parts_with_any_stride_are_not_copied(images, tokens):
    """The stride along a dimension of size 1 is arbitrary."""
    big = torch.randn(images, tokens, 1, 3)
    parts = [image.transpose(0, 1) for image in big]
    assert all(part.is_contiguous() and part.stride(0) != 3 * tokens for part in parts)
    whole = concatenated(parts)
    assert torch.equal(whole, torch.cat(parts))
    assert whole.data_ptr() == big.data_ptr() and whole.is_contiguous()  # without a copy


def test_unrelated_parts_are_concatenated():
    x = torch.randn(6, 4, 8, requires_grad=True) * 1
    a, b, c = x.split([2, 1, 3])
    wide = torch.randn(6, 4, 9)[..., :8]
    for parts in (
        [b, a, c], [a, c], [a, a], [a, b.clone(), c], [a, b.detach(), c], [a, b, x[3:]],
        list(wide.split([2, 4])), [t.detach() for t in (a, c)], [a, b],
    ):  # fmt: skip
        assert torch.equal(concatenated(parts), torch.cat(parts))


@pytest.mark.parametrize(
    "between",
    [Reversal.apply, lambda x: x.view_as(x), lambda x: Reversal.apply(x * 1)],
    ids=["a view with its own gradient", "a view", "of a view's maker"],
)
def test_gradients_of_split_parts_match_torch_cat(between):
    leaf = torch.randn(6, 4, 8, requires_grad=True)
    upstream = torch.randn(6, 4, 8)
    found = [
        torch.autograd.grad(f(between(leaf * 1).split([2, 4])), leaf, upstream)[0]
        for f in (concatenated, torch.cat)
    ]
    assert torch.equal(*found)


def test_cat_of_images_returns_packed_tensor():
    whole = torch.randn(9, 4, requires_grad=True) * 1
    images = anyres_result.split_images(whole, [2, 3, 4])
    assert torch.cat(images) is whole and torch.cat(images, dim=0) is whole
    assert torch.cat(tuple(images)) is whole
    for parts in (images[:2], images[::-1], [*images, whole], [whole[:2], *images[1:]]):
        result = torch.cat(parts)
        assert type(result) is torch.Tensor and result.shape[0] == sum(map(len, parts))
    assert torch.cat(images[:1], dim=1).shape == (2, 4)
    assert type(images[0] + 1) is torch.Tensor
    assert torch.equal(images[1], whole[2:5])


def test_invalid_arguments_raise_and_unsupported_fall_back():
    model = model_of("llava_onevision")
    vlm_fast.patch(model)
    features, newline = torch.randn(5, 16, 24), torch.randn(24)
    with pytest.raises(ValueError, match="positive height"):
        packed(model, [features], [[0, 32]], newline)
    with pytest.raises(ValueError, match="5 tiles, expected the base and"):
        packed(model, [features], [[16, 33]], newline)
    with pytest.raises(ValueError, match=r"image_newline is \(23,\)"):
        packed(model, [features], [[32, 32]], newline[1:])
    lone = torch.randn(1, 9, 24)  # another number of tokens is allowed: a single tile needs no grid
    with pytest.warns(UserWarning, match="pack_image_features runs as plain"):
        rows, _ = packed(model, [lone], [[32, 32]], newline)
    assert torch.equal(rows, torch.cat([lone[0], newline[None]]))
    with pytest.warns(UserWarning, match="not anyres_max_N"):
        packed(model, [features], [[32, 32]], newline, vision_aspect_ratio="anyres_max_x9")
