"""`pixel_shuffle_norm`: norms, norm positions, layouts, parity with transformers, errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.ops.test_saved_bytes import saved_bytes
from tests.ops.test_wrong_arguments import assert_refused
from vlm_fast.kernels import _pixel_shuffle_norm_cpu as cpu
from vlm_fast.ops.declaration import OPS
from vlm_fast.ops.patch_blocks import rows_of_blocks
from vlm_fast.verification import tolerance

OP = OPS["pixel_shuffle_norm"]


def arguments(norm, norm_after, layout, indexed, dtype):
    shape = dict(batch=2, height=6, width=4, features=20, indexed=indexed)
    return OP.sample(shape | dict(norm=norm, norm_after=norm_after, layout=layout), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("indexed", [False, True], ids=["grid", "index"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "ATen"])
def test_norms_and_layouts_match_reference(compiled, indexed, dtype, monkeypatch):
    if not compiled:
        monkeypatch.setattr(cpu, "native", None)
    for case in itertools.product(("layer", "rms", "gemma"), (True, False), ("patch", "channel")):
        verdicts = tolerance.check(OP, *arguments(*case, indexed, dtype))
        assert all(v.ok for v in verdicts), (case, verdicts)


def test_weights_in_a_wider_dtype():
    (x, weight, bias, _), options = arguments("layer", True, "patch", False, torch.bfloat16)
    assert all(v.ok for v in tolerance.check(OP, (x, weight.float(), bias.float(), None), options))


def test_shuffles_match_transformers():
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
    from transformers.models.internvl.modeling_internvl import InternVLModel
    from transformers.models.llama4.modeling_llama4 import pixel_shuffle

    x = torch.randn(2, 36, 5)
    for factor in (2, 3):
        ours = OP.fast(x, height=6, width=6, factor=factor)
        assert torch.equal(ours, Idefics3Connector.pixel_shuffle(None, x, factor))
        if factor == 2:
            theirs = InternVLModel.pixel_shuffle(None, x.view(2, 6, 6, 5), 0.5)
            assert torch.equal(ours, theirs.flatten(1, 2))
            assert torch.equal(ours, pixel_shuffle(x, 0.5))


def test_channel_major_ragged_images_match_unfold():
    grids, x = [(4, 6), (2, 2), (5, 7)], torch.randn(24 + 4 + 35, 5)
    columns, first = [], 0
    for height, width in grids:
        image = x[first : first + height * width].view(height, width, 5).permute(2, 0, 1)[None]
        columns.append(F.unfold(image, 2, stride=2)[0].t())
        first += height * width
    index = rows_of_blocks(grids, 2)
    assert torch.equal(OP.fast(x, None, None, index, layout="channel"), torch.cat(columns))


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (2, 1, 3)], ids=str)
def test_any_number_of_leading_dimensions(leading, norm):
    x, weight = torch.randn(*leading, 24, 5), None if norm == "none" else torch.randn(20)
    options = dict(height=4, width=6, norm=norm)
    assert all(v.ok for v in tolerance.check(OP, (x, weight), options))
    index = rows_of_blocks([(4, 6)] * (x.numel() // 120), 2)
    assert all(v.ok for v in tolerance.check(OP, (x, weight, None, index), options))


def test_consecutive_token_blocks_equal_a_grid_one_block_wide():
    x = torch.randn(24, 5)
    assert torch.equal(OP.fast(x, height=12, width=2), x.view(6, 20))


def test_unused_rows_have_zero_gradient():
    x = torch.randn(10, 4, requires_grad=True)
    index = torch.tensor([[9, 1, 4, 3]])
    OP.fast(x, None, None, index).sum().backward()
    assert x.grad.sum(1).tolist() == [0, 4, 0, 4, 4, 0, 0, 0, 0, 4]


@pytest.mark.parametrize("row", [-1, 48])
def test_out_of_range_index_raises(row):
    (x, weight, bias, index), options = arguments("layer", True, "patch", True, torch.float32)
    index[1, 2] = row
    with pytest.raises(ValueError, match=r"index names rows .*, expected 0 to 47"):
        OP(x, weight, bias, index, **options)


MISTAKES = {
    "height": (dict(height=5, width=4), "height", "5", "multiple of the factor 2"),
    "width": (dict(height=8, width=3), "width", "3", "multiple of the factor 2"),
    "no grid": (dict(height=0, width=0), "height", "above 0"),
    "another grid": (dict(height=4, width=4), "x", "4 x 4"),
    "factor": (dict(factor=0), "factor", "1 to 8"),
    "layout": (dict(layout="rows"), "layout", "'rows'", "one of"),
    "norm": (dict(norm="batch"), "norm", "'batch'", "one of"),
    "weights of a patch": (dict(norm_after=False), "weight", "= 20,)"),
    "a bias": (dict(norm="rms"), "bias", "None"),
    "weights without a norm": (dict(norm="none"), "weight", "None"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_invalid_arguments_raise(mistake):
    changes, *words = MISTAKES[mistake]
    args, options = arguments("layer", True, "patch", False, torch.float32)
    assert_refused(OP, args, options | changes, ValueError, *words)


@pytest.mark.parametrize(
    "change, exception",
    [
        (lambda index: index.float(), TypeError),
        (lambda index: index.short(), TypeError),
        (lambda index: index[:, :3], ValueError),
        (lambda index: index.flatten(), ValueError),
        (lambda index: index.to("meta"), ValueError),
    ],
)
def test_invalid_indices_raise(change, exception):
    (x, weight, bias, index), options = arguments("layer", True, "patch", True, torch.float32)
    assert_refused(OP, (x, weight, bias, change(index)), options, exception, "index")


def test_too_wide_rows_fall_back():
    x = torch.randn(4, 4096)
    weight = torch.ones(4096)
    options = dict(height=2, width=2, norm="rms", norm_after=False)
    assert "16384 features" in OP.why_not(x, weight, **options)
    assert OP.why_not(x, height=2, width=2) is None


def test_saves_x_and_two_numbers_per_merged_token():
    """Eager saves the shuffled copy as well."""
    args, options = arguments("layer", True, "patch", False, torch.float32)
    eager = saved_bytes(OP.reference, args, options, parameters=(0, 1, 2))
    assert saved_bytes(OP, args, options, parameters=(0, 1, 2)) == 2 * 6 * 2 * 4
    assert eager > args[0].numel() * 4
