"""What is said of a kernel and of a pass without a GPU: arithmetic whose answer is known."""

import dataclasses
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from tests.devtools.test_ahead_of_time import WITHIN
from vlm_fast.cli.main import main
from vlm_fast.devtools import memory_traffic, roofline_report
from vlm_fast.devtools.memory_traffic import Piece, moved
from vlm_fast.devtools.occupancy import occupancy
from vlm_fast.devtools.roofline_report import Given, Use
from vlm_fast.ops.declaration import OPS, Cost

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "registers, shared, warps, grid, blocks, share, limit, waves, tail",
    [
        # As NVIDIA's occupancy calculator has it for compute capability 9.0.
        (16, 0, 8, 132 * 8, 8, 1.0, "warps", 1.0, 1.0),
        (64, 0, 4, 132 * 12, 8, 0.5, "registers", 1.5, 0.75),
        (255, 0, 8, 1, 1, 0.125, "registers", 1 / 132, 1 / 132),
        (33, 0, 8, 132, 6, 0.75, "registers", 1 / 6, 1.0),  # in units of 256 a warp
        (16, 0, 1, 132, 32, 0.5, "blocks", 1 / 32, 1.0),
        (64, 73728, 4, 264, 3, 0.1875, "shared memory", 2 / 3, 1.0),
        (64, 227 * 1024, 8, 132, 1, 0.125, "shared memory", 1.0, 1.0),
    ],
)
def test_occupancy_is_that_of_the_calculator(
    registers, shared, warps, grid, blocks, share, limit, waves, tail
):
    found = occupancy("sm_90", registers, shared, warps, grid)
    assert (found.blocks, found.share, found.limit) == (blocks, share, limit)
    assert (found.waves, found.tail) == (pytest.approx(waves), pytest.approx(tail))


def test_a_block_that_does_not_fit_and_an_unknown_gpu():
    with pytest.raises(ValueError, match="shared memory: no block"):
        occupancy("sm_90", 32, 228 * 1024, 4, 1)
    with pytest.raises(KeyError):
        occupancy("sm_75", 32, 0, 4, 1)


def test_bytes_count_once_and_no_more_than_the_storage():
    x = torch.empty(4, 8)
    assert moved([x]) == 128 and moved([x], [x]) == 256  # read, and written
    assert moved([x, x, None, 3, [x]]) == 128
    assert moved([x[:2], x[2:]]) == 128 and moved([x, x[1:]]) == 128
    assert moved([torch.empty(1).expand(1000)]) == 4


@pytest.mark.parametrize("name", ["spatial_pool", "unmerge_tokens", "gated_add"])
def test_one_read_and_one_write_are_the_least_bytes(name):
    op = OPS[name]
    shape = next(iter(op.bench_shapes.values()))
    forward = [piece for piece in memory_traffic.pieces(op, shape) if not piece.backward]
    assert [piece.name for piece in forward if piece.launch] == [p.name for p in forward]
    assert sum(piece.bytes for piece in forward) == pytest.approx(
        roofline_report._cost(op, shape).forward_bytes, rel=1e-3
    )


def test_atens_work_is_counted_with_its_flops_and_in_its_order():
    shape = {"shape": (1, 2, 16), "hidden": 32, "out": 64}
    found = memory_traffic.pieces(OPS["mlp"], shape)
    products = [p for p in found if p.name in ("aten.mm", "aten.addmm")]
    flops = {(p.backward, p.flops) for p in products}
    assert (True, 2 * 2 * 32 * 64) in flops and not any(p.name == "aten.view" for p in found)
    assert [p.backward for p in found] == sorted(p.backward for p in found)
    with FakeTensorMode():
        assert memory_traffic.moved([torch.empty(2, 16, device="cuda")]) == 128


@pytest.mark.parametrize(
    "name, shape, least",
    [
        ("gather_image_tokens", "LLaVA-1.5-7B, 8 x 2944", 1.01),  # no zeros beside the rows
    ],
)
def test_what_a_backward_no_longer_moves(name, shape, least):
    op = OPS[name]
    found = memory_traffic.pieces(op, op.bench_shapes[shape])
    moved = sum(piece.bytes for piece in found if piece.backward)
    assert moved < least * roofline_report._cost(op, op.bench_shapes[shape]).backward_bytes


USE = Use(
    "op", "s", False, WITHIN, occupancy("sm_90", 64, 1024, 4, 10**4), 10**4, 43 * 10**8, False
)
GIVEN = Given(copy=4.3e12, matmul=790e12, launch=1e-6)


def passed(uses=(USE,), extra=(), least=43 * 10**8, flops=0):
    pieces = [Piece(use.resources.kernel, False, use.bytes, launch=object()) for use in uses]
    cost = Cost(flops, least, 0, 0)
    op = dataclasses.make_dataclass("Named", ["name"])("op")
    return roofline_report._pass(op, "s", False, [*pieces, *extra], uses, cost, GIVEN)


def test_the_model_is_bytes_or_flops_and_launches():
    found = passed()
    assert found.floor_seconds == pytest.approx(1e-3) and found.reasons == ()
    assert found.model_seconds == pytest.approx(1e-3 + 1e-6) and not found.misses
    assert passed(flops=2 * 790 * 10**9).floor_seconds == pytest.approx(2e-3)
    twice = passed(extra=[Piece("aten.copy_", False, 43 * 10**8)])
    assert twice.share == pytest.approx(1 / 2.002) and twice.misses
    assert twice.reasons == ("2.00x the least bytes (k 4300.0 MB, aten.copy_ 4300.0 MB)",)
    assert passed(uses=(), least=1).share is None  # nothing was counted


def changed(**changes):
    return dataclasses.replace(USE, resources=dataclasses.replace(WITHIN, **changes))


@pytest.mark.parametrize(
    "use, said",
    [
        (changed(spills=1), "k spills"),
        (changed(dots=1), "k: products without tensor cores"),
        (changed(wide_loads=0), "k: no load of 128 bits"),
        (changed(wide_stores=0), "k: no store of 128 bits"),
        (dataclasses.replace(USE, grid=66), "k: 66 blocks for 132 multiprocessors"),
        (dataclasses.replace(USE, occupancy=occupancy("sm_90", 255, 0, 4, 10**4)),
         "k: 12% of the warps resident (registers)"),
    ],
)  # fmt: skip
def test_each_reason_is_told(use, said):
    assert passed(uses=(use,)).reasons == (said,)


def test_idle_multiprocessors_slow_the_model():
    few = dataclasses.replace(USE, grid=66)
    assert passed(uses=(few,)).share == pytest.approx(0.5, rel=1e-2)


def test_asynchronous_loads_are_wide_too():
    assert passed(uses=(changed(wide_loads=0, async_loads=2),)).reasons == ()


def call(*arguments):
    return CliRunner().invoke(main.app, ["compile", "--report", *arguments])


def test_the_report_has_every_pass_kernel_and_what_never_ran():
    found = call("--op", "spatial_pool")
    assert found.exit_code == 0, found.output
    shapes = OPS["spatial_pool"].bench_shapes
    rows = [line for line in found.stdout.splitlines() if line.startswith("| spatial_pool")]
    assert len(rows) == 4 * len(shapes)  # two passes, each with a kernel
    assert "Nothing here is measured" in found.stdout and "**model**" in found.stdout
    content = json.loads(call("--op", "spatial_pool", "--json").stdout)
    assert {row["shape"] for row in content["passes"]} == set(shapes)
    assert all(0.5 < row["share"] <= 1 for row in content["passes"])
    assert all(use["resources"]["wide_loads"] for use in content["uses"])
    assert set(content["never_run"]) <= {"spatial_pool"}


@pytest.mark.parametrize("archs", [("sm_75",), ("gfx942",), ("sm_90", "sm_80")])
def test_a_report_is_of_one_known_gpu(archs):
    found = call(*[word for arch in archs for word in ("--arch", arch)])
    assert found.exit_code == main.Exit.USAGE and "a report is of one of sm_80" in found.output
