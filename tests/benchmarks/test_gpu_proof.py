"""The proofs of a GPU run, a process an op."""

import os
import time

from vlm_fast.benchmarks import gpu_proof


def test_proof_cut_off_is_no_proof():
    found = gpu_proof.prove("gather_image_tokens", "cpu", time.monotonic() - 1)
    assert found.parity["failures"] == ["gather_image_tokens: out of time"]


def test_an_op_that_ends_its_process_leaves_the_others_theirs(tmp_path):
    calls = {"ends": (os.abort,), "fails": (int, "x"), "is fine": (str, 7)}
    found, failures = gpu_proof.each(_apply, calls, time.monotonic() + 120, workers=2)
    assert found == {"is fine": "7"}
    assert failures[0].startswith("ends: BrokenProcessPool: ")
    assert failures[1].startswith("fails: ValueError: ")
    assert (
        gpu_proof.each(_apply, calls, time.monotonic(), workers=2)[1][2] == "is fine: out of time"
    )


def _apply(function, *arguments):
    return function(*arguments)


def test_a_kernel_that_nothing_launched_is_named(monkeypatch):
    monkeypatch.setattr(gpu_proof, "KERNELS", dict.fromkeys(["one", "other", "third"]))
    proofs = [gpu_proof.Proof({}, launched={"one"}), gpu_proof.Proof({}, launched={"third"})]
    assert gpu_proof.never_launched(proofs) == ["other: no check launches it"]
