"""Small kernels that are launched on a stub GPU."""

from vlm_fast.kernels import _launcher
from vlm_fast.kernels._launcher import Config, Kernel
from vlm_fast.kernels._python_launch import PythonLauncher
from vlm_fast.kernels._triton import tl, triton


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["q"])
def every_kind_of_argument(x, y, n, m, q, f, flag, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if y is not None:
        tl.store(x + i, tl.load(y + i) * f + n + m + q + flag)
    elif KIND == "gelu":
        tl.store(x + i, f)


@triton.jit
def add_one(x, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < count) + 1, mask=i < count)


def kernel_of(jit, *sizes):
    made = Kernel(jit, tuple(Config({"BLOCK": size}) for size in sizes), choose=lambda size: size)
    made.jit.device_caches.clear()
    del _launcher.KERNELS[made.name]
    return made


def one_program(blocks):
    return (1,)


def known(kernel):
    """How many compiled kernels a launcher knows."""
    if isinstance(kernel.launch, PythonLauncher):
        tables = {id(kernels): len(kernels) for _, kernels in kernel.launch.known.values()}
        return sum(tables.values())
    return kernel.launch.counts()[2]
