"""The key of a launch is the specialisation that Triton would choose."""

import random

import pytest
import torch

from tests.support import stub_gpu
from tests.support.stub_kernels import every_kind_of_argument, kernel_of, known
from vlm_fast.kernels import _fast_launch
from vlm_fast.kernels._triton import triton

pytestmark = pytest.mark.skipif(stub_gpu.why_none() is not None, reason=str(stub_gpu.why_none()))

INTEGERS = (0, 1, 2, 15, 16, 17, 32, 2**31 - 1, 2**31, 2**33, -16, -1, 2**31 - 16, -(2**31))
TEXTS = ("gelu", "silu", "gelu_tanh")


def random_arguments(rng, tensors):
    wide = rng.choice(INTEGERS)
    return (
        rng.choice(tensors), rng.choice([*tensors, None]), rng.choice(INTEGERS), wide,
        rng.choice(INTEGERS), rng.choice([1.0, 0.5]), rng.choice([True, False]),
        "".join(rng.choice(TEXTS)),
    )  # fmt: skip


WIDTHS = {"i32": 32, "fp32": 32, "i1": 1, "u1": 1}


def given_by(stub, kinds, launch):
    """What a launch gives the driver: function, sizes, and parameters as far as they are wide."""
    stub.stub_watch(len(kinds))
    launch()
    stub.stub_watch(0)
    parameters = [stub.stub_parameter(i) % 2 ** WIDTHS.get(k, 64) for i, k in enumerate(kinds)]
    return stub.stub_function(), [stub.stub_config(i) for i in range(7)], parameters


def tensors_of_three_dtypes():
    """Tensors at addresses that are divisible by 16, and not."""
    whole = [torch.zeros(64, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float16)]
    return [torch.nn.Parameter(whole[0]), *whole, *[t[1:] for t in whole], *[t[8:] for t in whole]]


def specialisation(kernel, config, arguments):
    """What distinguishes compiled kernels for Triton, as text."""
    jit = kernel.jit
    binder = jit.device_caches[triton.runtime.driver.active.get_current_device()][4]
    _, found, options = binder(*arguments, **kernel.configs[config].options)
    return f"{found} {options}"


def test_key_is_tritons_specialisation(stub):
    kernel, rng = kernel_of(every_kind_of_argument, 16, 32), random.Random(0)
    tensors, ours, tritons = tensors_of_three_dtypes(), {}, {}
    launcher = _fast_launch.make_launcher(print, kernel.jit, ({"BLOCK": 16}, {"BLOCK": 32}), {})
    for _ in range(6000):
        config, arguments = rng.randrange(2), random_arguments(rng, tensors)
        key = launcher.key(config, *arguments)
        wanted = specialisation(kernel, config, arguments)
        assert ours.setdefault(key, wanted) == wanted, (arguments, key)
        assert tritons.setdefault(wanted, key) == key, (arguments, wanted)
    assert len(ours) > 2000 and None not in ours


def test_launcher_gives_the_driver_what_triton_gives(stub):
    kernel, rng = kernel_of(every_kind_of_argument, 16, 32), random.Random(1)
    tensors = tensors_of_three_dtypes()
    for _ in range(12):
        config, arguments = rng.randrange(2), random_arguments(rng, tensors)
        options = kernel.configs[config].options

        def by_triton():
            return kernel.jit[(3, 2)](*arguments, **options)  # noqa: B023

        def by_launcher():
            kernel(lambda blocks: (3, 2), *arguments, size=config)  # noqa: B023

        kinds = [kind for kind in by_triton().src.signature.values() if kind != "constexpr"]
        wanted = given_by(stub, kinds, by_triton)
        by_launcher()
        by_launcher()
        assert given_by(stub, kinds, by_launcher) == wanted, (arguments, kinds)
    assert known(kernel) == len(kernel.jit.device_caches.popitem()[1][0])
