"""The way to the Hopper GEMMs and back, without a GPU: a stand-in takes the library's place."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vlm_fast
from tests.support.hopper_library import emulated
from vlm_fast import ops
from vlm_fast.kernels import _configs, _hopper
from vlm_fast.modules import MLPProjector
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
def test_outputs_and_gradients_are_right(shape, saved):
    for config in (1, 2):
        with emulated(config) as library:
            right(*sample(shape, saved=saved))
        assert library.calls == [f"linear_gelu_{config}", f"gelu_backward_{config}"]


@pytest.mark.parametrize("saved", ["preactivation", "input"])
def test_either_gemm_may_be_taken_alone(saved):
    # With gaps: what forward leaves must be what backward takes.
    for chosen in ("linear_gelu", "gelu_backward"):
        with emulated({**dict.fromkeys(_hopper.GEMMS, 0), chosen: 1}) as library:
            right(*sample(SHAPES["images with gaps"], saved=saved))
        assert library.calls == [f"{chosen}_1"]


@pytest.mark.parametrize("wanted", ["x", "weight_1", "bias_1", "weight_2", "bias_2"])
def test_each_gradient_alone_is_that_of_all_together(wanted):
    args, options = sample(SHAPES["rows beyond a tile"])
    names = MLP.tensors
    leaves = [a.detach().requires_grad_() for a in args]
    with emulated(1):
        y = ops.mlp(*leaves, **options)
        dy = torch.randn_like(y)
        every = dict(zip(names, torch.autograd.grad(y, leaves, dy), strict=True))
        alone = [a.detach().requires_grad_(name == wanted) for name, a in zip(names, args)]  # noqa: B905
        y = ops.mlp(*alone, **options)
        (found,) = torch.autograd.grad(y, [alone[names.index(wanted)]], dy)
    assert torch.equal(found, every[wanted])


def test_without_gradients_no_preactivation_is_kept():
    args, options = sample(SHAPES["rows beyond a tile"])
    with emulated(1) as library, torch.no_grad():
        kept = []
        library._linear_gelu = lambda tile, *rest: kept.append(rest[4])
        ops.mlp(*args, **options)
    assert kept == [None]


@pytest.mark.parametrize(
    "what, change, options",
    [
        ("float32", lambda t: t.float(), {}),
        ("float16", lambda t: t.half(), {}),
        ("another activation", lambda t: t, {"activation": "gelu_tanh"}),
    ],
)
def test_what_the_library_has_no_kernel_for_goes_the_usual_way(what, change, options):
    args, _ = sample(SHAPES["rows beyond a tile"])
    args = tuple(change(a) for a in args)
    with emulated(1) as library:
        right(args, options)
    assert library.calls == []


@pytest.mark.parametrize(
    "shape",
    [dict(shape=(9, 20), hidden=8, out=8), dict(shape=(9, 8), hidden=12, out=12),
     dict(shape=(0, 8), hidden=8, out=8)],
)  # fmt: skip
def test_rows_that_tma_cannot_take_go_the_usual_way(shape):
    args, options = sample(shape)
    with emulated(1) as library:
        y = ops.mlp(*args, **options)
    assert library.calls == []
    assert torch.equal(y, ops.mlp(*args, **options))


def test_only_the_sizes_of_a_gemm_decide_over_it():
    # out = 12 is no row of 16 bytes, but the first linear does not see it.
    with emulated(1) as library:
        right(*sample(dict(shape=(9, 8), hidden=16, out=12)))
    assert library.calls == ["linear_gelu_1"]


def test_tensors_between_the_aligned_addresses_are_copied():
    args, options = sample(SHAPES["rows beyond a tile"])

    def shifted(t):
        return torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape)

    moved = tuple(map(shifted, args))
    assert all(t.data_ptr() % 16 for t in moved)
    with emulated(2) as library:
        right(moved, options)
    assert len(library.calls) == 2


def test_weights_and_gradients_in_other_orders_are_copied():
    (x, weight_1, bias_1, weight_2, bias_2), options = sample(SHAPES["rows beyond a tile"])
    across = lambda t: t.t().contiguous().t()  # noqa: E731
    with emulated(1) as library:
        right((across(x), across(weight_1), bias_1, across(weight_2), bias_2), options)
        leaf = x.clone().requires_grad_()
        found = ops.mlp(leaf, weight_1, bias_1, weight_2, bias_2)
        (one,) = torch.autograd.grad(found.sum(), leaf, retain_graph=True)  # dy of stride 0
        (other,) = torch.autograd.grad(found, leaf, torch.ones_like(found))
    assert torch.equal(one, other)
    assert len(library.calls) == 5


def test_rows_go_to_their_slots_and_negative_ones_nowhere():
    torch.manual_seed(0)
    h, weight, bias = torch.randn(5, 16), torch.randn(24, 16), torch.randn(24)
    h, weight, bias = (t.bfloat16() for t in (h, weight, bias))
    out = torch.full((9, 32), 7.0, dtype=torch.bfloat16)
    slots = torch.tensor([6, -1, 0, 8, 3], dtype=torch.int32)
    with emulated(1):
        _hopper.linear_scatter(1, h, weight, bias, slots, out[:, :24])
    expected = out.new_full((9, 32), 7.0)
    y = torch.nn.functional.linear(h.float(), weight.float(), bias.float()).bfloat16()
    kept = slots >= 0
    expected[slots[kept].long(), :24] = y[kept]
    assert torch.equal(out, expected)


MERGE = OPS["mlp_merge"]
SMALL = dict(batch=2, sequence=30, images=2, tokens=9, inner=24, middle=136, hidden=40)


@pytest.mark.parametrize("saved", ["all", "preactivation", "input"])
def test_the_second_linear_writes_into_the_slots(saved):
    for config in (1, 2):
        with emulated(config) as library:
            args, options = MERGE.sample({**SMALL, "saved": saved}, torch.bfloat16)
            failures = [v for v in tolerance.check(MERGE, args, options) if not v.ok]
        assert not failures, failures
        assert library.calls == [
            f"{name}_{config}" for name in ("linear_gelu", "linear_scatter", "gelu_backward")
        ]


def test_embeddings_of_another_dtype_are_merged_behind_the_projector():
    (embeds, *rest), _ = MERGE.sample(SMALL, torch.bfloat16)
    with emulated(1) as library:
        out = ops.mlp_merge(embeds.float(), *rest)
    assert library.calls == ["linear_gelu_1"]
    assert out.dtype is torch.float32
    rows = ops.mlp(*rest[:-1])
    assert torch.equal(out, ops.merge_image_tokens(embeds.float(), rows, rest[-1]))


def test_a_projector_merges_what_it_projects():
    torch.manual_seed(0)
    projector = MLPProjector(24, 136, 40, activation="silu", saved="input")
    (embeds, x, *_, mask), _ = MERGE.sample(SMALL)
    expected = ops.merge_image_tokens(embeds, projector(x), mask)
    with vlm_fast.strict():  # no fallback
        assert torch.equal(projector.merge(embeds, x, mask), expected)
    seen = []
    projector.linear_2.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(projector.merge(embeds, x, mask), expected)
    assert seen  # a child that is not plain is called


def test_an_error_of_the_library_names_the_function():
    args, options = sample(SHAPES["one row"])
    with emulated(2) as library:
        library._linear_gelu = lambda *arguments: b"invalid argument"
        with pytest.raises(RuntimeError, match="linear_gelu, config 2: invalid argument"):
            ops.mlp(*args, **options)


@pytest.mark.parametrize("saved", ["all", "preactivation", "input"])
def test_stand_ins_without_data_get_the_shapes_and_no_call(saved):
    args, options = sample(SHAPES["images with gaps"], saved=saved)
    needs = MLP.NeedsGrad(*[True] * 5)
    settings = {**MLP.defaults, **options}
    for config in (1, {**dict.fromkeys(_hopper.GEMMS, 0), "gelu_backward": 1}):
        with emulated(config) as library:
            y, kept = MLP._forward(needs, *args, **settings)
            before = len(library.calls)
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                fakes = [mode.from_tensor(a) for a in args]
                fake_y, fake_kept = MLP._forward(needs, *fakes, **settings)
                found = MLP._path.backward(needs, fake_kept, fake_y, **settings)
            assert len(library.calls) == before
        for real, fake in zip((y, *kept), (fake_y, *fake_kept), strict=True):
            assert (real is None) == (fake is None)
            if real is not None:
                assert (real.shape, real.stride()) == (fake.shape, fake.stride())
        assert [g.shape for g in found] == [a.shape for a in args]


def test_tables_choose_and_nothing_measured_is_cublas(monkeypatch):
    x = torch.randn(600, 8).bfloat16()
    monkeypatch.setattr(_hopper, "runs_here", lambda like: True)
    for table, config in (({}, 0), ({"512": 2}, 2), ({"512": 7}, 0), ({"512": 0, "8192": 1}, 0)):
        entries = {"linear_gelu": {"bfloat16": table}}
        monkeypatch.setattr(_configs, "_table", lambda device, entries=entries: entries)
        _configs.winner.cache_clear()
        assert _hopper.LINEAR_GELU.choose(x, 600, (8, 8)) == config
    _configs.winner.cache_clear()


def test_the_library_is_refused_where_it_lacks_a_function(monkeypatch, tmp_path):
    # Any library will do that is not this one.
    other = next(Path(torch.__file__).parent.glob("lib/libc10*.so"))
    for path, said in ((other, "built from other sources"), (tmp_path / "none.so", "not built")):
        _hopper.load.cache_clear()
        _hopper.why_absent.cache_clear()
        monkeypatch.setattr(_hopper, "LIBRARY", path)
        assert said in _hopper.why_absent()
    _hopper.load.cache_clear()
    _hopper.why_absent.cache_clear()


@pytest.mark.parametrize("gemm", _hopper.GEMMS.values(), ids=_hopper.GEMMS.keys())
def test_python_and_cuda_list_the_same_functions_tiles_and_arguments(gemm):
    source = (CSRC / f"hopper_{gemm.name}.cu").read_text()
    tiles = re.findall(r"CONFIG == (\d+)\nusing Tiling = Tile<(\d+), (\d+), (\w+)>", source)
    schedules = {"PingPong": "ping-pong", "Cooperative": "cooperative"}
    assert [
        (int(n), _hopper.Tile(int(rows), int(cols), schedules[schedule]))
        for n, rows, cols, schedule in tiles
    ] == [*enumerate(gemm.configs)][1:]
    (arguments,) = re.findall(rf"VLM_FAST_EXPORT\({gemm.name}\)\n\((.*?)\) {{", source, re.DOTALL)
    kinds = ["int64_t" if "int64_t" in a else "void*" for a in arguments.split(",")]
    names = {"int64_t": _hopper.TYPES["i"], "void*": _hopper.TYPES["p"]}
    assert [names[kind] for kind in kinds] == gemm.argument_types
    assert f"vlm_fast_v{_hopper.ABI}_##name" in (CSRC / "hopper_gemm.h").read_text()
