"""Every kernel with every config, compiled for three GPU generations without a GPU."""

import ast
import dataclasses
import json
import time

import pytest

pytest.importorskip("triton")
import triton
import triton.language as tl
import typer
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from typer.testing import CliRunner

from tests.support.address_arithmetic import overflowing_products
from tests.support.selection import slow_except
from vlm_fast.devtools import ahead_of_time, budgets, sass
from vlm_fast.devtools.ahead_of_time import ARCHS, Resources
from vlm_fast.devtools.budgets import BUDGETS_TRITON, violations
from vlm_fast.kernels._launcher import KERNELS

# `make compile-all` compiles for the other architectures.
every_arch = pytest.mark.parametrize("arch", slow_except(["sm_90"], ARCHS))


@every_arch
def test_declared_kernels_are_all_launched_by_bench_shapes(compiled, arch):
    exclusive = {name for name, kernel in KERNELS.items() if kernel.exclusive}
    assert {(r.kernel, r.config * (r.kernel not in exclusive)) for r in compiled(arch)} == {
        (name, config)
        for name, kernel in KERNELS.items()
        for config in range(1 if kernel.exclusive else len(kernel.configs))
    }


@every_arch
def test_kernels_stay_within_budgets(compiled, arch):
    assert triton.__version__ == BUDGETS_TRITON, "make test runs this with the budgets' Triton"
    assert violations(compiled(arch)) == []


def test_budgets_name_existing_kernels_and_counts():
    counts = {field.name for field in dataclasses.fields(Resources)}
    shipped = budgets.read()
    assert shipped.keys() == KERNELS.keys()
    for archs in shipped.values():
        assert archs.keys() == set(ARCHS)
        assert all(bounds.keys() <= counts for bounds in archs.values())


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_addresses_do_not_overflow(builds, kernel):
    own = [build.ttir() for build in builds if build.kernel.name == kernel]
    assert own and all("tt.addptr" in ttir for ttir in own)
    assert [line for ttir in own for line in overflowing_products(ttir)] == []


# ---- these tests can fail ----

WITHIN = Resources("k", "x bf16", 1, "sm_90", 64, 0, 0, 1024, 0, 0, 4, 4, 9, 9, 0, 0, 0.1)
BUDGET = {"k": {"sm_90": {"registers": 64, "shared_bytes": 1024, "wide_loads": 4}}}


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(stack_bytes=8), "spills"),
        (dict(spills=1), "spills"),
        (dict(registers=65), "at most 64"),
        (dict(shared_bytes=1025), "at most 1024"),
        (dict(shared_bytes=48 * 1024 + 1, config=0), f"at most {48 * 1024}"),
        (dict(shared_bytes=227 * 1024 + 1), f"at most {227 * 1024}"),
        (dict(wide_loads=3), "at least 4"),
        (dict(wide_loads=3, signature="x fp16, y fp32"), "at least 4"),
        (dict(arch="sm_80"), "no budget on sm_80"),
        (dict(kernel="j"), "no budget"),
    ],
)
def test_budget_violation_is_reported(change, said):
    assert said in " ".join(violations([dataclasses.replace(WITHIN, **change)], BUDGET))


def test_values_within_budget_are_not_reported():
    narrow = dataclasses.replace(WITHIN, signature="x fp32", wide_loads=3)
    assert violations([WITHIN, narrow], BUDGET) == []


def run_command(monkeypatch, tmp_path, shipped, resources, *arguments):
    """Run `python -m vlm_fast.devtools.budgets`; return exit code, output and file."""
    path = tmp_path / "budgets.json"
    path.write_text(budgets.as_text(shipped))
    monkeypatch.setattr(budgets, "BUDGETS", path)
    monkeypatch.setattr(budgets, "version_of", lambda package: BUDGETS_TRITON)
    monkeypatch.setattr(ahead_of_time, "compile_all", lambda progress: resources)
    app = typer.Typer()
    app.command()(budgets.main)
    found = CliRunner().invoke(app, arguments)
    return found.exit_code, found.output, json.loads(path.read_text())


@pytest.mark.parametrize(
    "change, budget, said",
    [
        ({}, BUDGET, ""),
        (dict(registers=65), BUDGET, "registers 65, at most 64"),
        (dict(wide_loads=3), BUDGET, "wide_loads 3, at least 4"),
        ({}, {}, "k has no budget on sm_90"),
        ({}, {"k": {**BUDGET["k"], "sm_80": {}}}, "k has a budget on sm_80, but no op launches it"),
        ({}, {**BUDGET, "gone": BUDGET["k"]}, "gone has a budget on sm_90, but no op launches it"),
    ],
)
def test_check_fails_on_missing_exceeded_and_stale_budgets(
    monkeypatch, tmp_path, change, budget, said
):
    built = [dataclasses.replace(WITHIN, **change)]
    code, output, after = run_command(monkeypatch, tmp_path, budget, built, "--check")
    assert code == bool(said) and said in output
    assert after == budget


def test_budgets_file_is_rewritten_deterministically(monkeypatch, tmp_path):
    built = [
        WITHIN,
        dataclasses.replace(WITHIN, registers=65, wide_stores=2, signature="x fp16"),
        dataclasses.replace(WITHIN, arch="sm_100", shared_bytes=9, wide_loads=0),
        dataclasses.replace(WITHIN, kernel="j", signature="x fp32"),  # the mask has only 16 bits
    ]
    code, _, after = run_command(monkeypatch, tmp_path, {"gone": BUDGET["k"]}, built)
    narrow = {"registers": 64, "shared_bytes": 1024}
    assert code == 0 and after == {
        "j": {"sm_90": narrow},
        "k": {
            "sm_90": {"registers": 72, "shared_bytes": 1024, "wide_loads": 4, "wide_stores": 2},
            "sm_100": {"registers": 64, "shared_bytes": 9, "wide_stores": 4},
        },
    }
    assert list(after["k"]) == ["sm_90", "sm_100"]
    assert run_command(monkeypatch, tmp_path, after, built, "--check")[0] == 0
    reordered = dict(reversed(after.items()))
    assert budgets.as_text(reordered) == budgets.as_text(after)


def test_budgets_allow_no_spills(monkeypatch, tmp_path):
    spilling = [dataclasses.replace(WITHIN, stack_bytes=8)]
    for arguments in ((), ("--check",)):
        code, output, _ = run_command(monkeypatch, tmp_path, BUDGET, spilling, *arguments)
        assert code == 1 and "spills (8 bytes of stack" in output


def test_budgets_require_their_compiler_version(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(budgets, "version_of", lambda package: "3.9.0")
    with pytest.raises(typer.Exit) as raised:
        budgets.main()
    assert raised.value.exit_code == 3
    assert f"need triton {BUDGETS_TRITON}, found 3.9.0" in capsys.readouterr().err


OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def square_matmul_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    row, col = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a_ptr + row * SIZE + col), tl.load(b_ptr + row * SIZE + col))
    tl.store(c_ptr + row * SIZE + col, product)


@triton.jit
def copy_tile_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    source = tl.make_tensor_descriptor(a_ptr, [SIZE, SIZE], [SIZE, 1], [SIZE, SIZE])
    target = tl.make_tensor_descriptor(b_ptr, [SIZE, SIZE], [SIZE, 1], [SIZE, SIZE])
    target.store([0, 0], source.load([0, 0]))


def counted(kernel, arch, **options):
    signature = dict(a_ptr="*bf16", b_ptr="*bf16", c_ptr="*fp32", SIZE="constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(kernel, signature, dict(SIZE=128), aligned)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=OPTIONS | options)
    return sass.inspect([compiled.asm], arch)[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_tensor_cores_and_wide_accesses_are_counted(fresh_cache, arch):
    found = counted(square_matmul_kernel, arch)
    assert found["tensor_core"] and found["wide_loads"] and found["wide_stores"]
    assert 64 < found["registers"] < 255 and not found["stack_bytes"] and not found["spills"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])  # sm_90 tensor cores need larger tiles
def test_spills_are_counted(fresh_cache, arch):
    found = counted(square_matmul_kernel, arch, maxnreg=64)
    assert found["stack_bytes"] and found["spills"] and found["registers"] <= 64


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_bulk_copies_are_counted(fresh_cache, arch):
    assert counted(copy_tile_kernel, arch)["tma"] >= 2


def test_amd_is_compiled_on_request(fresh_cache):
    found = ahead_of_time.compile_all(["gfx942"], ops=["gather_image_tokens"])
    assert found and all(r.registers and not r.stack_bytes and not r.spills for r in found)
    assert any(r.wide_loads and r.wide_stores for r in found)


@pytest.mark.parametrize("archs, ops", [(["sm90"], None), (["sm_90"], ["no_such_op"])])
def test_unknown_names_raise(archs, ops):
    with pytest.raises(ValueError, match=r"'sm90'|'no_such_op'"):
        ahead_of_time.compile_all(archs, ops=ops)


def test_kernel_parsing_is_serialised_across_threads(tmp_path, monkeypatch):
    """Parsing in two threads at once may raise a SystemError before Python 3.12."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # no kernel was compiled before
    parse, inside, most = ast.parse, [], []

    def noted(*args, **options):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        tree = parse(*args, **options)
        inside.pop()
        return tree

    monkeypatch.setattr(ast, "parse", noted)
    todo = list(ahead_of_time.builds(ARCHS[:1], ops=["gated_add"], thorough=False))
    ahead_of_time.count(todo[:4])
    assert len(most) >= 4 and max(most) == 1
