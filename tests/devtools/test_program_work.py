"""Work of a program, counted in Triton's IR, against counts by hand."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.cases import OPS
from vlm_fast.devtools.device_time import counts, pass_kernels
from vlm_fast.devtools.device_time.program_work import Program

CODE = """
module {
  tt.func public @k(%x_ptr: !tt.ptr<bf16> loc("x_ptr"(#loc)), %n: i32, %y_ptr: !tt.ptr<f32>) {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %c32 = arith.constant 32 : i32 loc(#loc1)
    %zero = arith.constant dense<0.000000e+00> : tensor<64x32xf32> loc(#loc1)
    %p = tt.get_program_id x : i32 loc(#loc1)
    %end = arith.muli %p, %n : i32 loc(#loc1)
    %at = tt.splat %x_ptr : !tt.ptr<bf16> -> tensor<64x16x!tt.ptr<bf16>> loc(#loc1)
    %acc = scf.for %i = %c0 to %end step %c32 iter_args(%a = %zero) -> (tensor<64x32xf32>)  : i32 {
      %x = tt.load %at : tensor<64x16x!tt.ptr<bf16>> loc(#loc1)
      %w = tt.load %at : tensor<16x32x!tt.ptr<bf16>> loc(#loc1)
      %d = tt.dot %x, %w, %a : tensor<64x16xbf16> * tensor<16x32xbf16> -> tensor<64x32xf32>
      %e = math.exp2 %d : tensor<64x32xf32> loc(#loc1)
      scf.yield %e : tensor<64x32xf32> loc(#loc1)
    } loc(#loc1)
    %s = "tt.reduce"(%acc) <{axis = 0 : i32}> ({
    ^bb0(%l: f32 loc(callsite(#loc1 at #loc2)), %r: f32 loc(callsite(#loc1 at #loc2))):
      %t = arith.addf %l, %r : f32 loc(#loc1)
      tt.reduce.return %t : f32 loc(#loc1)
    }) : (tensor<64x32xf32>) -> tensor<32xf32> loc(#loc1)
    %first = arith.cmpi eq, %p, %c0 : i32 loc(#loc1)
    scf.if %first {
      %o = tt.splat %y_ptr : !tt.ptr<f32> -> tensor<32x!tt.ptr<f32>> loc(#loc1)
      tt.store %o, %s : tensor<32x!tt.ptr<f32>> loc(#loc1)
    } loc(#loc1)
    tt.return loc(#loc1)
  }
}
"""


def test_loops_run_as_often_as_their_bounds_say():
    # Programs 0, 1 and 2 take 0, 2 and 4 turns.
    work = Program(CODE, {"n": 64}, warps=4).work((3,))
    assert work.wide_flops == 2 * 2 * 64 * 16 * 32 and work.narrow_flops == 0
    assert work.moved["read", frozenset(["x_ptr"])] == 2 * 2 * (64 * 16 + 16 * 32)
    assert work.moved["written", frozenset(["y_ptr"])] == pytest.approx(32 * 4 / 3)
    assert work.steps == 2 + 1  # a product a turn, and the reduction
    assert work.loads == work.looped_loads == 2 * 2


def test_products_of_few_rows_or_warps_are_narrow():
    assert Program(CODE, {"n": 64}, warps=2).work((3,)).narrow_flops == 2 * 2 * 64 * 16 * 32


def test_unknown_bounds_take_the_assumed_turns():
    work = Program(CODE, {}, warps=4, unknown_trips=(5,)).work((3,))
    assert work.wide_flops == 5 * 2 * 64 * 16 * 32


def test_a_while_loop_is_taken_once():
    loop = """
    %d:2 = scf.while (%i = %c0, %s = %zero) : (i32, tensor<64x32xf32>) -> (i32, tensor<64x32xf32>) {
      %more = arith.cmpi slt, %i, %n : i32
      scf.condition(%more) %i, %s : i32, tensor<64x32xf32>
    } do {
    ^bb0(%j: i32, %t: tensor<64x32xf32>):
      %e = math.exp2 %t : tensor<64x32xf32>
      scf.yield %n, %e : i32, tensor<64x32xf32>
    }
    tt.return
"""
    before = Program(CODE, {"n": 64}, warps=4).work((3,)).instructions
    code = CODE.replace("    tt.return loc(#loc1)\n", loop)
    found = Program(code, {"n": 64}, warps=4).work((3,))
    assert found.instructions == pytest.approx(before + 4 * 64 * 32 / 128)


def test_static_instructions_take_each_loop_once():
    program = Program(CODE, {"n": 64}, warps=4)
    exp2 = 4 * 64 * 32 / 128
    loads = 2 * 64 * 16 / 16 / 128 + 1
    reduction = 64 * 32 / 128 + 10
    assert program.static_instructions() == pytest.approx(
        exp2 + max(1, loads) + reduction + 1, abs=1.5
    )


def counted(name, shape, mode):
    pytest.importorskip("triton")
    kernels = pass_kernels.of_op(OPS[name], OPS[name].bench_shapes[shape])[mode]
    return counts.count(kernels, "sm_90")


def test_attention_reads_keys_once_and_does_two_products():
    (found,) = counted("cross_attention", "1025 keys, 16 images", "forward")
    queries, keys, rows, tiled, ones = 32, 1025, 64, 17 * 64, 16
    flops = found.programs * (found.wide_flops + found.narrow_flops)
    assert flops == pytest.approx(16 * 12 * 2 * rows * tiled * (64 + 64 + ones), rel=0.01)
    least = 2 * 16 * 12 * 64 * (2 * queries + 2 * keys)
    assert least <= found.bytes <= 1.05 * least


def test_attention_backward_reads_keys_once_and_does_five_products():
    """And one more of a tile, whose diagonal is the mean of dp."""
    (found,) = counted("cross_attention", "BLIP-2, 64 images", "backward")
    queries, keys, tiles = 32, 257, 5
    flops = found.programs * (found.wide_flops + found.narrow_flops)
    assert flops == pytest.approx(64 * 12 * 2 * queries * 64 * 64 * (5 * tiles + 1), rel=0.01)
    least = 2 * 64 * 12 * 64 * (5 * queries + 4 * keys)
    assert least <= found.bytes <= 1.15 * least


def test_an_elementwise_kernel_moves_the_least_bytes():
    op = OPS["gated_add"]
    for label, shape in op.bench_shapes.items():
        (found,) = counted("gated_add", label, "forward")
        with FakeTensorMode():
            values, settings = op.sample(shape, torch.bfloat16)
            assert found.bytes == pytest.approx(
                op.cost_of(*values, **settings).forward_bytes, rel=0.01
            )


def test_products_of_aten_are_counted_with_their_sizes_in_order():
    op = OPS["mlp"]
    passes = pass_kernels.of_op(op, {"shape": (1, 2, 16), "hidden": 32, "out": 64})
    sizes = [k.sizes for k in passes["backward"] if isinstance(k, pass_kernels.AtenKernel)]
    assert (1, 2, 32, 64) in sizes  # the gradient of the activation
    assert not any(getattr(k, "name", "") == "aten.view" for k in passes["backward"])


def test_the_reference_is_counted_forward_and_backward():
    found = pass_kernels.of_reference(OPS["gated_add"], {"shape": (3, 16)})
    names = [kernel.name for kernel in found["forward"]]
    assert "aten.tanh" in names and "aten.mul" in names and found["backward"]


def test_media_attention_backward_reads_queries_once():
    """Neither o nor its low part is read."""
    shape = "OpenFlamingo-9B, 8 x 2048, 4 images"
    (found,) = counted("media_cross_attention", shape, "backward")
    rows, heads = 8 * 2048, 8
    flops = found.programs * (found.wide_flops + found.narrow_flops)
    assert flops == pytest.approx(5 * 2 * rows * heads * 64 * 64, rel=0.01)
    least = 2 * heads * 64 * (3 * rows + 4 * 8 * 256)
    assert least <= found.bytes <= 1.05 * least
