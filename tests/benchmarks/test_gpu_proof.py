"""The verification of a GPU run, one process per op."""

import os
import time

from vlm_fast.benchmarks import gpu_proof


def test_interrupted_verification_is_not_a_pass():
    found = gpu_proof.prove("gather_image_tokens", "cpu", time.monotonic() - 1)
    assert found.parity["failures"] == ["gather_image_tokens: out of time"]


def test_crash_of_one_op_keeps_results_of_others(tmp_path):
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


def test_unlaunched_kernel_is_reported(monkeypatch):
    monkeypatch.setattr(gpu_proof, "KERNELS", dict.fromkeys(["one", "other", "third"]))
    proofs = [gpu_proof.Proof({}, launched={"one"}), gpu_proof.Proof({}, launched={"third"})]
    assert gpu_proof.never_launched(proofs) == ["other: no check launches it"]
