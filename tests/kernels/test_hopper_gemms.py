"""How `mlp` calls the Hopper GEMMs, with Python functions in place of the extension."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.hopper_library import PythonGemms, python_gemms
from vlm_fast import ops
from vlm_fast.kernels import _hopper
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import tolerance

MLP = OPS["mlp"]
CSRC = Path(_hopper.__file__).resolve().parent.parent / "csrc"
SHAPES = {
    "one row": dict(shape=(1, 8), hidden=8, out=16),
    "rows beyond a tile": dict(shape=(259, 24), hidden=136, out=40),
    "no bias": dict(shape=(130, 16), hidden=72, out=8, bias=False),
    "images with gaps": dict(shape=(3, 10, 24), drop_first=1, hidden=72, out=16),
}


def sample(shape, **more):
    torch.manual_seed(0)
    return MLP.sample({**shape, **more}, torch.bfloat16)


def right(args, options):
    failures = [v for v in tolerance.check(MLP, args, options) if not v.ok]
    assert not failures, failures


@pytest.mark.parametrize("saved", ["all", "preactivation", "input"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_outputs_and_gradients_match_reference(shape, saved):
    with python_gemms() as gemms:
        right(*sample(shape, saved=saved))
    assert gemms.calls == ["linear_gelu", "gelu_backward"]


@pytest.mark.parametrize("saved", ["preactivation", "input"])
def test_each_gemm_works_without_the_other(saved):
    # With gaps between images: backward must read the layout that forward wrote.
    for chosen in ("linear_gelu", "gelu_backward"):
        with python_gemms(chosen) as gemms:
            right(*sample(SHAPES["images with gaps"], saved=saved))
        assert gemms.calls == [chosen]


@pytest.mark.parametrize("wanted", ["x", "weight_1", "bias_1", "weight_2", "bias_2"])
def test_single_gradient_equals_gradient_with_all_wanted(wanted):
    args, options = sample(SHAPES["rows beyond a tile"])
    names = MLP.tensors
    leaves = [a.detach().requires_grad_() for a in args]
    with python_gemms():
        y = ops.mlp(*leaves, **options)
        dy = torch.randn_like(y)
        every = dict(zip(names, torch.autograd.grad(y, leaves, dy), strict=True))
        leaves = [a.detach().requires_grad_(name == wanted) for name, a in zip(names, args)]  # noqa: B905
        y = ops.mlp(*leaves, **options)
        (found,) = torch.autograd.grad(y, [leaves[names.index(wanted)]], dy)
    assert torch.equal(found, every[wanted])


def test_no_grad_saves_no_preactivation():
    args, options = sample(SHAPES["rows beyond a tile"])
    with python_gemms() as gemms, torch.no_grad():
        kept = []
        gemms.linear_gelu = lambda *arguments: kept.append(arguments[4])
        ops.mlp(*args, **options)
    assert kept == [0]


@pytest.mark.parametrize(
    "what, change, options",
    [
        ("float32", lambda t: t.float(), {}),
        ("float16", lambda t: t.half(), {}),
        ("another activation", lambda t: t, {"activation": "gelu_tanh"}),
    ],
)
def test_unsupported_dtypes_and_options_use_the_triton_path(what, change, options):
    args, _ = sample(SHAPES["rows beyond a tile"])
    args = tuple(change(a) for a in args)
    with python_gemms() as gemms:
        right(args, options)
    assert gemms.calls == []


@pytest.mark.parametrize(
    "shape",
    [dict(shape=(9, 20), hidden=8, out=8), dict(shape=(9, 8), hidden=12, out=12),
     dict(shape=(0, 8), hidden=8, out=8)],
)  # fmt: skip
def test_row_sizes_unsupported_by_tma_use_the_triton_path(shape):
    args, options = sample(shape)
    with python_gemms() as gemms:
        y = ops.mlp(*args, **options)
    assert gemms.calls == []
    assert torch.equal(y, ops.mlp(*args, **options))


def test_each_gemm_is_chosen_by_its_own_sizes():
    # Rows of out = 12 are no multiple of 16 bytes, but the first linear does not use them.
    with python_gemms() as gemms:
        right(*sample(dict(shape=(9, 8), hidden=16, out=12)))
    assert gemms.calls == ["linear_gelu"]


def test_unaligned_tensors_are_copied():
    args, options = sample(SHAPES["rows beyond a tile"])

    def shifted(t):
        return torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape)

    moved = tuple(map(shifted, args))
    assert all(t.data_ptr() % 16 for t in moved)
    with python_gemms() as gemms:
        right(moved, options)
    assert len(gemms.calls) == 2


def test_noncontiguous_weights_and_gradients_are_copied():
    (x, weight_1, bias_1, weight_2, bias_2), options = sample(SHAPES["rows beyond a tile"])
    across = lambda t: t.t().contiguous().t()  # noqa: E731
    with python_gemms() as gemms:
        right((across(x), across(weight_1), bias_1, across(weight_2), bias_2), options)
        leaf = x.clone().requires_grad_()
        found = ops.mlp(leaf, weight_1, bias_1, weight_2, bias_2)
        (one,) = torch.autograd.grad(found.sum(), leaf, retain_graph=True)  # dy of stride 0
        (other,) = torch.autograd.grad(found, leaf, torch.ones_like(found))
    assert torch.equal(one, other)
    assert len(gemms.calls) == 5


def test_extension_errors_are_raised():
    def failing(*arguments):
        raise RuntimeError("vlm_fast linear_gelu: invalid argument")

    args, options = sample(SHAPES["one row"])
    with python_gemms() as gemms:
        gemms.linear_gelu = failing
        with pytest.raises(RuntimeError, match="linear_gelu: invalid argument"):
            ops.mlp(*args, **options)


@pytest.mark.parametrize("saved", ["all", "preactivation", "input"])
def test_fake_tensors_get_shapes_without_a_call(saved):
    args, options = sample(SHAPES["images with gaps"], saved=saved)
    needs = MLP.NeedsGrad(*[True] * 5)
    settings = {**MLP.defaults, **options}
    for chosen in (("linear_gelu", "gelu_backward"), ("gelu_backward",)):
        with python_gemms(*chosen) as gemms:
            y, kept = MLP._forward(needs, *args, **settings)
            before = len(gemms.calls)
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                fakes = [mode.from_tensor(a) for a in args]
                fake_y, fake_kept = MLP._forward(needs, *fakes, **settings)
                found = MLP._path.backward(needs, fake_kept, fake_y, **settings)
            assert len(gemms.calls) == before
        for real, fake in zip((y, *kept), (fake_y, *fake_kept), strict=True):
            assert (real is None) == (fake is None)
            if real is not None:
                assert (real.shape, real.stride()) == (fake.shape, fake.stride())
        assert [g.shape for g in found] == [a.shape for a in args]


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 3071, 3072])
def test_hopper_gemms_need_a_minimum_of_rows(monkeypatch, rows):
    x = torch.empty(rows, 8, dtype=torch.bfloat16)
    assert not _hopper.takes_linear_gelu(x, rows, 8, 8)  # there is no extension, or no Hopper GPU
    monkeypatch.setattr(_hopper, "runs_here", lambda like: True)
    assert _hopper.takes_linear_gelu(x, rows, 8, 8) == (rows >= 3072)
    assert _hopper.takes_gelu_backward(x, rows, 8, 8) == (rows >= 128)


def test_python_gemms_have_the_extension_signatures():
    bindings = (CSRC / "hopper_bindings.cpp").read_text()
    for name in ("linear_gelu", "gelu_backward"):
        (body,) = re.findall(rf'm\.def\(\s*"{name}",(.*?)without_gil\);', bindings, re.DOTALL)
        theirs = [a.removesuffix("_ptr") for a in re.findall(r'py::arg\("(\w+)"\)', body)]
        theirs = ["out_features" if a == "out" else a for a in theirs]
        assert theirs == list(inspect.signature(getattr(PythonGemms(), name)).parameters)
    tile = re.search(
        r"using Tile = cute::Shape<cute::_(\d+), cute::_(\d+),",
        (CSRC / "hopper_gemm.h").read_text(),
    )
    assert tile.groups() == (str(_hopper.TILE),) * 2
