"""A kernel with exclusive configs is compiled with the config that each launch chooses."""

import pytest

pytest.importorskip("triton")
from vlm_fast.devtools import ahead_of_time
from vlm_fast.kernels._launcher import KERNELS


def test_each_launch_is_compiled_with_its_own_exclusive_config():
    built = ahead_of_time.builds(["sm_90"], ops=["cross_attention"])
    found = {(b.config, "d 128," in b.signature) for b in built if b.kernel.exclusive}
    assert found == {(0, False), (1, True)}


def test_exclusive_configs_are_chosen_by_size():
    kernels = [k for k in KERNELS.values() if k.exclusive]
    assert kernels and all(len(k.configs) > 1 for k in kernels)
