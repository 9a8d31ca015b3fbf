"""The table of configs that a user measures: written whole, read with suspicion, never an error."""

import json
import os
import signal
import stat
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from tests.kernels.test_configs import BROKEN, OnGpu
from tests.support import distributed_helpers
from tests.support.user_tables import CHOICE, GPU, KERNEL, NAME, chosen
from tests.support.user_tables import place as place  # a fixture
from vlm_fast.cli import main
from vlm_fast.devtools import tuning
from vlm_fast.kernels import _configs, _user_table
from vlm_fast.kernels._launcher import KERNELS


def edited(place, **changes):
    path = place / NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_written_table_is_chosen_and_private(place):
    assert chosen() == (0, [])
    path = tuning.write(NAME, GPU, CHOICE)
    assert path == place / NAME and chosen() == (3, []) and chosen(10**6) == (3, [])
    assert (
        stat.S_IMODE(place.lstat().st_mode) == stat.S_IMODE(place.parent.lstat().st_mode) == 0o700
    )
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    content = json.loads(path.read_text())
    assert content.keys() == _user_table.KEYS and content["gpu"] == GPU
    assert content["versions"]["torch"] == torch.__version__


def test_the_users_sizes_come_before_the_shipped(place, tmp_path, monkeypatch):
    monkeypatch.setattr(_configs, "DIRECTORY", tmp_path)
    shipped = {KERNEL.name: {"bfloat16": {"2048": 1}, "float32": {"8": 2}}, "other": {}}
    (tmp_path / NAME).write_text(json.dumps({"schema": 1, "kernels": shipped}))
    assert chosen(2048)[0] == 1
    tuning.write(NAME, GPU, CHOICE)
    assert chosen(2048)[0] == 3
    monkeypatch.setenv(_user_table.SWITCH, "off")
    assert chosen(2048) == (1, [])
    assert _configs.overlaid(shipped, CHOICE)[KERNEL.name]["float32"] == {"8": 2}


def test_a_table_is_read_once(place, monkeypatch):
    tuning.write(NAME, GPU, CHOICE)
    assert chosen()[0] == 3
    monkeypatch.setattr(_user_table, "load", lambda *_: pytest.fail("read again"))
    assert KERNEL.choose(OnGpu, 77) is KERNEL.configs[3]


def test_what_is_measured_later_is_added(place):
    tuning.write(NAME, GPU, CHOICE)
    tuning.write(NAME, GPU, {KERNEL.name: {"bfloat16": {"4": 2}, "float32": {"4": 1}}})
    assert chosen()[0] == 3 and chosen(4)[0] == 2


def test_two_writers_lose_nothing_and_leave_nothing_behind(place):
    entries = [{KERNEL.name: {"bfloat16": {str(2**i): i % 6}}} for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda entry: tuning.write(NAME, GPU, entry), entries))
    assert [chosen(2**i)[0] for i in range(16)] == [i % 6 for i in range(16)]
    assert {path.name for path in place.iterdir()} <= {NAME, f"{NAME}.lock"}


def test_a_writer_that_dies_leaves_the_old_table(place, monkeypatch):
    tuning.write(NAME, GPU, CHOICE)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        tuning.write(NAME, GPU, {KERNEL.name: {"bfloat16": {"1024": 1}}})
    assert chosen() == (3, [])


def write_many(rank, cache):
    """One entry after the other; the first process dies in the middle of its fourth."""
    os.environ["VLM_FAST_CACHE_DIR"] = cache
    for i in range(6):
        if rank == 0 and i == 3:
            os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        tuning.write(NAME, GPU, {KERNEL.name: {"bfloat16": {str(2 ** (8 * i + rank)): rank % 6}}})


def test_eight_processes_on_a_cold_cache_and_one_is_killed(place):
    """No lock stays behind, and only what the dead one had not written is missing."""
    cache = str(place.parent)
    writers = distributed_helpers.start(write_many, (cache,), 8, join=False)
    for process in writers.processes:
        process.join()
    codes = [process.exitcode for process in writers.processes]
    assert codes == [-signal.SIGKILL] + [0] * 7
    table = _configs.read(place / NAME)[KERNEL.name]["bfloat16"]
    written = {str(2 ** (8 * i + rank)): rank % 6 for rank in range(8) for i in range(6)}
    lost = {str(2 ** (8 * i)) for i in (3, 4, 5)}
    assert table == {size: index for size, index in written.items() if size not in lost}
    tuning.write(NAME, GPU, CHOICE)
    assert chosen() == (3, [])


# ---- what is wrong with a file ----


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_a_miss_and_put_aside(place, content):
    tuning.private_directory()
    (place / NAME).write_bytes(content if isinstance(content, bytes) else content.encode())
    index, warned = chosen()
    assert index == 0
    aside = (place / f"{NAME}.bad").exists()
    assert len(warned) == aside and aside != (place / NAME).exists()
    assert chosen() == (0, [])  # gone, or of a newer version and left alone


@pytest.mark.parametrize(
    "changes",
    [{"kernels": []}, {"sources": 3}, {"versions": None}, {"more": 1}, {"schema": True},
     {"schema": "1"}],
    ids=str,
)  # fmt: skip
def test_other_keys_and_types_are_no_table(place, changes):
    tuning.write(NAME, GPU, CHOICE)
    edited(place, **changes)
    assert chosen()[0] == 0 and (place / f"{NAME}.bad").exists()


def test_deeply_nested_and_endless_files_are_a_miss(place):
    tuning.private_directory()
    (place / NAME).write_text("[" * 100_000)
    assert chosen()[0] == 0
    (place / NAME).write_text(" " * (_user_table.MOST_BYTES + 1))
    assert chosen()[0] == 0
    (place / NAME).unlink()
    os.mkfifo(place / NAME)
    assert chosen()[0] == 0


@pytest.mark.parametrize("schema", [0, 2])
def test_a_table_of_another_version_is_left_alone(place, schema):
    tuning.write(NAME, GPU, CHOICE)
    edited(place, schema=schema)
    assert chosen() == (0, []) and (place / NAME).exists()


@pytest.mark.parametrize(
    "size, index",
    [("4", 8), ("4", -1), ("4", 1.0), ("4", float("nan")), ("4", "1"), ("4", None), ("4", True),
     ("4", {"num_warps": 3}), ("4", [1]), ("-4", 1), ("04", 1), (" 4", 1), ("4_0", 1), ("४", 1),
     ("9" * 5000, 1), ("many", 1), ("", 1)],
)  # fmt: skip
def test_a_bad_entry_is_a_miss_and_the_others_stand(place, size, index):
    tuning.write(NAME, GPU, CHOICE)
    edited(place, kernels={KERNEL.name: {"bfloat16": {"1024": 3, size: index}, "float32": [1]}})
    assert chosen(4) == (3, []) and chosen(1024) == (3, [])
    edited(place, kernels={KERNEL.name: {"bfloat16": {size: index}}, "x": "y"})
    assert chosen(4) == (0, [])


def test_an_entry_of_another_source_is_a_miss(place, monkeypatch):
    other = KERNELS["gather_image_tokens_kernel"].name
    tuning.write(NAME, GPU, {**CHOICE, other: {"bfloat16": {"1024": 1}}})
    monkeypatch.setattr(KERNEL, "configs", (*KERNEL.configs[::-1],))
    found = _user_table.find(NAME, _configs.SOURCES)
    assert found.stale == (KERNEL.name,) and found.kernels.keys() == {other} and found.digest
    edited(place, sources={})
    assert _user_table.find(NAME, _configs.SOURCES).kernels == {}


def test_a_source_is_the_code_the_functions_it_calls_and_the_configs(monkeypatch):
    assert len({kernel.source() for kernel in KERNELS.values()}) == len(KERNELS)
    before = KERNEL.source()
    monkeypatch.setattr(KERNEL, "configs", KERNEL.configs[:-1])
    shorter = KERNEL.source()
    monkeypatch.setattr(KERNEL, "jit", SimpleNamespace(cache_key="another"))
    assert len({before, shorter, KERNEL.source()}) == 3


def test_another_triton_is_a_miss(place):
    tuning.write(NAME, GPU, CHOICE)
    edited(place, versions={"triton": "1.0"})
    index, warned = chosen()
    assert index == 0 and "measured with Triton 1.0" in warned[0]


def test_what_else_lies_there_is_never_read(place):
    tuning.write(NAME, GPU, CHOICE)
    for planted in (f"{NAME}.x.tmp", "table.pkl", "kernel.so", "kernel.cubin", f"{NAME}.bad"):
        (place / planted).write_bytes(b"\x80\x04garbage")
    assert chosen() == (3, [])


# ---- what is wrong with the directory ----


def symlinked(place):
    place.rename(place.with_name("real"))
    place.symlink_to(place.with_name("real"))


def a_file(place):
    (place / NAME).unlink()
    (place / f"{NAME}.lock").unlink()
    place.rmdir()
    place.write_text("")


SPOILT = {
    "group-writable": lambda place: place.chmod(0o770),
    "other-writable": lambda place: place.chmod(0o702),
    "in a group-writable one": lambda place: place.parent.chmod(0o770),
    "symlinked": symlinked,
    "a file": a_file,
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_an_insecure_directory_is_not_used_and_warned_of_once(place, spoil):
    tuning.write(NAME, GPU, CHOICE)
    spoil(place)
    index, warned = chosen()
    assert index == 0 and len(warned) == 1 and str(place.parent) in warned[0]
    assert chosen() == (0, [])
    with pytest.raises(PermissionError, match=str(place.parent)):
        tuning.write(NAME, GPU, CHOICE)


def test_a_strangers_directory_is_not_used(place, monkeypatch):
    tuning.write(NAME, GPU, CHOICE)
    monkeypatch.setattr(os, "geteuid", lambda: place.lstat().st_uid + 1)
    index, warned = chosen()
    assert index == 0 and "belongs to user" in warned[0]


def test_a_symlinked_table_is_not_followed(place, tmp_path):
    tuning.write(NAME, GPU, CHOICE)
    (place / NAME).rename(tmp_path / "elsewhere.json")
    (place / NAME).symlink_to(tmp_path / "elsewhere.json")
    assert chosen()[0] == 0


def test_a_directory_in_the_place_of_the_table_is_a_miss(place):
    (tuning.private_directory() / NAME).mkdir()
    assert chosen()[0] == 0


def test_a_directory_that_cannot_be_written_is_named(place, monkeypatch):
    tuning.private_directory()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="cannot be written"):
        tuning.write(NAME, GPU, CHOICE)


@pytest.mark.parametrize("name", ["VLM_FAST_CACHE_DIR", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("value", ["cache", "./x", "~/cache", "/tmp/../etc", "/"])
def test_unsafe_values_are_refused(place, monkeypatch, name, value):
    monkeypatch.delenv("VLM_FAST_CACHE_DIR")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name):
        _user_table.directory()
    index, warned = chosen()
    assert index == 0 and name in warned[0]
    assert CliRunner().invoke(main.app, ["tune"]).exit_code == main.Exit.USAGE


def test_the_directory_is_where_the_variables_say(monkeypatch, tmp_path):
    monkeypatch.delenv("VLM_FAST_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert _user_table.directory() == tmp_path / ".cache" / "vlm_fast" / "configs"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(_user_table.directory()) == "/x/vlm_fast/configs"
    monkeypatch.setenv("VLM_FAST_CACHE_DIR", "/y")
    assert str(_user_table.directory()) == "/y/configs"


# ---- the same choice on every rank ----


@pytest.mark.parametrize("how", ["torchrun", "a group"])
def test_ranks_ignore_it_unless_it_is_asked_for(place, monkeypatch, how):
    tuning.write(NAME, GPU, CHOICE)
    if how == "torchrun":
        monkeypatch.setenv("WORLD_SIZE", "2")
    else:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    index, warned = chosen()
    assert index == 0 and len(warned) == 1 and f"{_user_table.SWITCH}=1" in warned[0]
    monkeypatch.setenv(_user_table.SWITCH, "1")
    assert chosen() == (3, [])


def test_a_group_without_a_table_is_not_warned(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert chosen() == (0, [])


def test_a_value_that_is_no_switch_is_ignored(place, monkeypatch):
    tuning.write(NAME, GPU, CHOICE)
    monkeypatch.setenv(_user_table.SWITCH, "perhaps")
    index, warned = chosen()
    assert index == 3 and "is not a switch" in warned[0]
