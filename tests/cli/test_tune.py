"""The command ``vlm-fast tune``: proves, measures, writes, and says what it lacks."""

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.support.user_tables import CHOICE, GPU, KERNEL, NAME, chosen
from tests.support.user_tables import place as place  # a fixture
from vlm_fast.cli import main
from vlm_fast.devtools import tuning
from vlm_fast.kernels import _user_table
from vlm_fast.ops.declaration import OPS


def call(*arguments):
    return CliRunner().invoke(main.app, list(arguments))


@pytest.fixture
def measured(place, monkeypatch):
    """A GPU that finds config 2 fastest, config 4 wrong, and time for one kernel of two."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernels = (KERNEL.name, "gather_image_tokens_kernel")
    by_op = {name: ["gather_image_tokens"] for name in kernels}
    monkeypatch.setattr(tuning, "_ops_of_kernels", lambda: by_op)

    def prove(names, **_):
        for index in range(len(KERNEL.configs)):
            failures = ("merge_image_tokens: off by 1",) if index == 4 else ()
            yield tuning.Candidate(KERNEL.name, index, failures)

    def measure(right, names, **_):
        rows = []
        for index in right[KERNEL.name]:
            median = 1e-5 / (1 + (index == 2))
            times = {"median": median, "lower": median * 0.99, "upper": median * 1.01}
            row = {"kernel": KERNEL.name, "dtype": "bfloat16", "size": 64, "config": index}
            rows.append({**row, **times})
        return rows, True

    monkeypatch.setattr(tuning, "prove", prove)
    monkeypatch.setattr(tuning, "measure", measure)
    return place


def test_tune_writes_the_winner_and_names_what_is_wrong(measured):
    found = call("tune", "--op", "gather_image_tokens", "--json")
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    assert report["table"] == str(measured / NAME) and 4 not in {
        r["config"] for r in report["rows"]
    }
    assert report["left_out"][0]["config"] == 4
    assert "gather_image_tokens_kernel" in report["not_reached"] and not report["finished"]
    assert chosen(64) == (2, [])
    text = call("tune", "--op", "gather_image_tokens").stdout
    assert "2.00x" in text and "left out: merge_image_tokens_kernel, config 4" in text
    assert KERNEL.name in call("tune", "--show").stdout
    (row,) = json.loads(call("tune", "--show", "--json").stdout)
    assert row["kernels"] == {KERNEL.name: {"bfloat16": {"64": 2}}} and row["digest"]
    assert f"deleted: {measured / NAME}" in call("tune", "--delete").stdout
    assert chosen(64) == (0, []) and "no user tables" in call("tune", "--show").stdout


def test_tune_fails_where_nothing_is_right(measured, monkeypatch):
    wrong = tuning.Candidate(KERNEL.name, 0, ("raised OutOfResources",))
    monkeypatch.setattr(tuning, "prove", lambda *_, **__: iter([wrong]))
    monkeypatch.setattr(tuning, "measure", lambda *_, **__: ([], True))
    found = call("tune")
    assert found.exit_code == main.Exit.FAILURE and not (measured / NAME).exists()
    assert "nothing was written" in found.output and "wrong with its default" in found.output

    def broken(*_, **__):
        raise RuntimeError("k with config 1 broke the GPU")
        yield

    monkeypatch.setattr(tuning, "prove", broken)
    found = call("tune")
    assert found.exit_code == main.Exit.FAILURE and "broke the GPU; nothing" in found.output


def test_tune_says_what_it_lacks_before_it_works(place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = call("tune")
    assert found.exit_code == main.Exit.ENVIRONMENT and "no GPU is seen" in found.output
    assert not place.parent.exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tuning.private_directory().chmod(0o777)
    monkeypatch.setattr(tuning, "prove", lambda *_, **__: pytest.fail("worked"))
    found = call("tune")
    assert found.exit_code == main.Exit.ENVIRONMENT and "chmod 700" in found.output


@pytest.mark.parametrize(
    "arguments", [("--op", "nope"), ("--dtype", "int8"), ("--seconds", "0"), ("--show", "--delete")]
)
def test_tune_refuses_what_it_does_not_know(place, arguments):
    assert call("tune", *arguments).exit_code == main.Exit.USAGE


def test_a_dry_run_lists_and_writes_nothing(place, monkeypatch):
    few = {name: OPS[name] for name in ("mlp", "spatial_pool")}
    monkeypatch.setattr(tuning, "OPS", few)
    monkeypatch.setattr(tuning, "_ops_of_kernels", tuning._ops_of_kernels.__wrapped__)
    found = call("tune", "--op", "mlp", "--dry-run", "--json")
    assert found.exit_code == 0, found.output
    plan = json.loads(found.stdout)
    assert {row["kernel"] for row in plan["kernels"]} == {
        "linear_activation_kernel", "mlp_activation_backward_kernel",
    }  # fmt: skip
    assert plan["table"].startswith(str(place)) and not place.parent.exists()


def test_env_tells_the_tables_in_force(place, monkeypatch):
    def facts():
        return {f["name"]: f for f in json.loads(call("env", "--json").stdout)}

    assert facts()["cache directory"]["value"].endswith("not made yet")
    tuning.write(NAME, GPU, CHOICE)
    assert facts()["cache directory"]["value"].endswith("private")
    place.chmod(0o777)
    spoilt = facts()["cache directory"]
    assert spoilt["value"] == "not used" and "chmod 700" in spoilt["cause"]
    place.chmod(0o700)
    monkeypatch.setattr(main.environment, "_gpus", lambda: iter(()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert facts()["user's config table"]["value"].startswith("1 kernels, before those shipped")
    monkeypatch.setenv(_user_table.SWITCH, "0")
    assert facts()["user's config table"]["value"] == f"{_user_table.SWITCH} is off"
