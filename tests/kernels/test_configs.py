"""The shipped tables of kernel configs: advice that can be absent, old or broken."""

import json

import pytest
import torch

from vlm_fast.kernels import _configs, _hopper, _launcher
from vlm_fast.kernels._configs import lookup, read, table_name

SIZES = {"1024": 1, "4096": 2, "65536": 3}
TABLE = {"rows_kernel": {"bfloat16": SIZES}}


@pytest.mark.parametrize(
    "size, index",
    [(0, 1), (1, 1), (1024, 1), (2047, 1), (2048, 1), (2049, 2), (4096, 2), (16384, 2), (16385, 3),
     (10**9, 3)],
)  # fmt: skip
def test_nearest_octave_wins_and_ties_go_to_the_smaller(size, index):
    assert lookup(TABLE, "rows_kernel", "bfloat16", size) == index


@pytest.mark.parametrize("kernel, dtype", [("other_kernel", "bfloat16"), ("rows_kernel", "int8")])
def test_what_was_not_measured_gets_the_default(kernel, dtype):
    assert lookup(TABLE, kernel, dtype, 1024) == 0


def test_order_in_the_table_does_not_matter():
    backwards = {"rows_kernel": {"bfloat16": dict(reversed(SIZES.items()))}}
    sizes = [2**k + d for k in range(1, 20) for d in (-1, 0, 1)]
    assert [lookup(TABLE, "rows_kernel", "bfloat16", s) for s in sizes] == [
        lookup(backwards, "rows_kernel", "bfloat16", s) for s in sizes
    ]


def table(entry, schema=_configs.SCHEMA):
    return json.dumps({"schema": schema, "kernels": {"rows_kernel": {"bfloat16": entry}}})


def test_a_good_table_is_read(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(table(SIZES))
    assert read(path) == TABLE


BROKEN = {
    "empty": "",
    "truncated": table(SIZES)[:-9],
    "garbage": "\x00\x01 not JSON",
    "not UTF-8": b"\xff\xfe\xfa",
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "no schema": json.dumps({"kernels": TABLE}),
    "no kernels": json.dumps({"schema": _configs.SCHEMA}),
    "newer schema": table(SIZES, schema=_configs.SCHEMA + 1),
    "schema as text": table(SIZES, schema=str(_configs.SCHEMA)),
    "kernels as a list": json.dumps({"schema": _configs.SCHEMA, "kernels": ["rows_kernel"]}),
    "sizes as a list": table([1, 2]),
    "size not a number": table({"many": 1}),
    "negative size": table({"-1": 1}),
    "index as text": table({"1024": "1"}),
    "index a fraction": table({"1024": 1.0}),
    "index NaN": table({"1024": float("nan")}),
    "index true": table({"1024": True}),
    "negative index": table({"1024": -1}),
    "index beyond any list": table({"1024": 8}),
    "nested too deeply": table({"1024": {"num_warps": 4}}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_tables_count_as_none(tmp_path, content):
    path = tmp_path / "table.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read(path) == {}


def test_unreadable_tables_count_as_none(tmp_path):
    assert read(tmp_path / "absent.json") == {}
    assert read(tmp_path) == {}


@pytest.mark.parametrize(
    "gpu", ["NVIDIA H100 80GB HBM3", "../../etc/passwd", "a/b\\c:d", "x.json\x00", "..", "", "ü"]
)
def test_table_names_stay_in_their_folder(gpu):
    name = table_name((9, 0), gpu)
    assert (_configs.DIRECTORY / name).resolve().parent == _configs.DIRECTORY.resolve()
    assert name.isascii() and name.startswith("sm_90_") and name.endswith(".json")
    assert set(name.removesuffix(".json")) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"
    )


def test_table_names_tell_gpus_apart():
    assert table_name((9, 0), "NVIDIA H100") != table_name((9, 0), "NVIDIA H200")
    assert table_name((9, 0), "NVIDIA H100") != table_name((10, 0), "NVIDIA H100")


@pytest.mark.parametrize("kernel", _launcher.KERNELS.values(), ids=_launcher.KERNELS.keys())
def test_kernels_list_few_configs_with_powers_of_two(kernel):
    assert 1 <= len(kernel.configs) <= 8
    assert len(
        {(tuple(c.blocks.items()), c.num_warps, c.num_stages) for c in kernel.configs}
    ) == len(kernel.configs)
    for config in kernel.configs:
        assert config.blocks.keys() == kernel.configs[0].blocks.keys()
        for size in (*config.blocks.values(), config.num_warps):
            assert size > 0 and size & (size - 1) == 0
        assert config.num_warps <= 16 and 1 <= config.num_stages <= 8


class OnGpu:
    """As much of a CUDA tensor as the choice of a config looks at."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)


@pytest.mark.parametrize("kernel", _launcher.KERNELS.values(), ids=_launcher.KERNELS.keys())
def test_the_choice_is_the_tables_and_the_default_beyond_the_list(kernel, monkeypatch):
    chosen = {}
    for index in range(8):
        entries = {kernel.name: {"bfloat16": {"1024": index}}}
        monkeypatch.setattr(_configs, "_table", lambda device, entries=entries: entries)
        getattr(_configs.winner, "cache_clear", lambda: None)()
        chosen[index] = kernel.choose(OnGpu, 1024)
        assert kernel.choose(OnGpu, 1024) is chosen[index]
    getattr(_configs.winner, "cache_clear", lambda: None)()
    for index, config in chosen.items():
        assert config is kernel.configs[index if index < len(kernel.configs) else 0]


def test_shipped_tables_are_valid_and_name_existing_configs():
    for path in _configs.DIRECTORY.glob("*.json"):
        kernels = read(path)
        assert kernels, f"{path.name} is not readable"
        for name, by_dtype in kernels.items():
            for by_size in by_dtype.values():
                listed = {**_launcher.KERNELS, **_hopper.GEMMS}[name].configs
                assert all(i < len(listed) for i in by_size.values())
