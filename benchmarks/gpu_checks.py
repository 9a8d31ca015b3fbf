"""Checks of the ops that need a GPU; each returns its failures, one line each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vlm_fast.devtools.passes import step, with_upstream
from vlm_fast.kernels._launcher import KERNELS, Kernel
from vlm_fast.ops.declaration import FLOATS, OPS, Op
from vlm_fast.verification import self_test
from vlm_fast.verification.tolerance import convert, differentiable

Failures = list[str]
BATCH = 5  # of every op's large shape; no other size is 5
LARGE_BYTES = 40 * 2**30  # memory that the large shapes need, with gradients and copies


def cases(
    device: str, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Op[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """Yield every op in every dtype at one sample of its first named shape, smaller on a CPU."""
    for op in (OPS[name] for name in names or OPS):
        shape = self_test.one_sample(next(iter(op.bench_shapes.values())))
        if device == "cpu":
            shape = self_test.shrink(shape)
        for dtype in FLOATS:
            torch.manual_seed(0)
            args, options = op.sample(shape, dtype, device)
            yield f"{op.name} {str(dtype).removeprefix('torch.')}", op, args, options


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def repeats(device: str, names: Iterable[str] | None = None) -> Failures:
    """Ten calls on the same inputs give the same bits; on a CPU three calls."""
    failures, more = [], 2 if device == "cpu" else 9
    for label, op, args, options in cases(device, names):
        inputs = with_upstream(op, args, options)
        first = step(op.fast, inputs, options)
        if not all(equal(first, step(op.fast, inputs, options)) for _ in range(more)):
            failures.append(f"{label}: results differ from call to call")
    return failures


def no_synchronisation(device: str, names: Iterable[str] | None = None) -> Failures:
    """Forward and backward raise no error in torch's mode that forbids host synchronisations."""
    failures = []
    for label, op, args, options in cases(device, names):
        inputs = with_upstream(op, args, options)
        step(op.fast, inputs, options)  # compiling a kernel may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(op.fast, inputs, options)
        except RuntimeError as error:
            failures.append(f"{label}: {error}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return failures


def side_stream(device: str, names: Iterable[str] | None = None) -> Failures:
    """Ops run on the current stream, after the work that is queued there and fills their inputs."""
    failures = []
    for label, op, args, options in cases(device, names):
        inputs = with_upstream(op, args, options)
        expected = step(op.fast, inputs, options)
        late = _empty_like(inputs)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(100_000_000)
            _copy(late, inputs)
            found = step(op.fast, late, options)
        torch.cuda.synchronize()
        if not equal(found, expected):
            failures.append(f"{label}: not on the current stream")
    return failures


def cuda_graphs(device: str, names: Iterable[str] | None = None) -> Failures:
    """A captured CUDA graph, replayed on other inputs, gives the bits of an ordinary call."""
    failures = []
    for label, op, args, options in cases(device, names):
        inputs = with_upstream(op, args, options)
        passes = {"forward": _forward, "forward+backward": step}
        for name, run in passes.items():
            expected = run(op.fast, inputs, options)
            static = _empty_like(inputs)
            _copy(static, with_upstream(op, convert(args, torch.Tensor.neg), options))
            try:
                graph, found = captured(lambda s=static, r=run, o=op, p=options: r(o.fast, s, p))
            except RuntimeError as error:
                failures.append(f"{label}: {name}: not captured: {error}")
                continue
            _copy(static, inputs)
            graph.replay()
            torch.cuda.synchronize()
            if not equal(found, expected):
                failures.append(f"{label}: {name}: the replay differs")
    return failures


@contextlib.contextmanager
def launched_by(launcher: str) -> Iterator[None]:
    """Launch every kernel that has run by this launcher: "c", "python" or "triton".

    A kernel's first call after this goes through Triton, which gives it its launcher.
    """
    with mock.patch.dict(os.environ, VLM_FAST_LAUNCHER=launcher):
        _forget_launchers()
        try:
            yield
        finally:
            _forget_launchers()


def _forget_launchers() -> None:
    for kernel in KERNELS.values():
        kernel.launch = kernel.launch_by_triton


def launchers(device: str, names: Iterable[str] | None = None) -> Failures:
    """The launcher in C, the one in Python and Triton itself give the same bits."""
    failures = []
    for label, op, args, options in cases(device, names):
        inputs = with_upstream(op, args, options)
        expected = None
        for launcher in ("triton", "python", "c"):
            with launched_by(launcher):
                for _ in range(3):  # the first compiles, the second fills the launcher's table
                    found = step(op.fast, inputs, options)
                kinds = {type(k.launch).__name__ for k in KERNELS.values() if _has_run(k)}
            expected = found if expected is None else expected
            if not equal(found, expected):
                failures.append(f"{label}: the launcher {launcher} gives other results")
            wanted = {"triton": set(), "python": {"PythonLauncher"}, "c": {"Launcher"}}[launcher]
            if not kinds <= wanted:
                failures.append(f"{label}: launched by {kinds}, not by {launcher}")
    return failures


def _has_run(kernel: Kernel) -> bool:
    return kernel.launch != kernel.launch_by_triton


def captured(call: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def _forward(
    function: Callable[..., Any], inputs: tuple[Any, ...], options: Mapping[str, Any]
) -> list[Tensor]:
    with torch.no_grad():
        results = function(*inputs[:-1], **options)
    return list(results) if isinstance(results, tuple) else [results]


def _empty_like(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return convert(inputs, lambda t: torch.empty_like(t).requires_grad_(t.requires_grad))


def _copy(targets: tuple[Any, ...], sources: tuple[Any, ...]) -> None:
    with torch.no_grad():
        for target, source in zip(differentiable(targets), differentiable(sources), strict=True):
            target.copy_(source)


def large(device: str) -> Failures:
    """With more than 2^31 elements, each sample has the results and gradients of its own call."""
    failures = []
    for name, op in OPS.items():
        torch.manual_seed(0)
        args, options = op.sample(op.large_shape, torch.bfloat16, device)
        inputs = with_upstream(op, args, options)
        whole = step(op.fast, inputs, options)
        sample, part = (_share, _share) if op.large_along == "features" else (_sample, _part)
        for i in range(BATCH):
            alone = {k: v // BATCH if k == "count" else v for k, v in options.items()}
            args = tuple(sample(value, i) for value in inputs[:-1])
            upstream = [t if t is None else part(t, i) for t in inputs[-1]]
            parts = step(op.fast, (*args, upstream), alone)
            for j, (expected, found) in enumerate(zip(parts, whole, strict=True)):
                if found.numel() != BATCH * expected.numel():
                    continue  # the gradient of a weight: a sum over the samples
                # A GEMM with another number of rows may sum in another order.
                allowed = 0.0 if op.bitwise else 2**-6 * expected.abs().max().item()
                error = (part(found, i).view(expected.shape) - expected).abs().max().item()
                if not error <= allowed:
                    failures.append(f"{name}: tensor {j} of sample {i} is off by {error:.3g}")
        del args, inputs, whole, upstream, parts, found, expected
        if device != "cpu":
            torch.cuda.empty_cache()
    return failures


def _part(tensor: Tensor, i: int) -> Tensor:
    """The part of sample i in a tensor whose rows are in the order of the samples."""
    rows = tensor.shape[0] // BATCH
    return tensor[i * rows : (i + 1) * rows]


def _share(value: Any, i: int) -> Any:
    """The i-th part of the last dimension of a floating tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    share = value.detach().chunk(BATCH, -1)[i].contiguous()
    return share.requires_grad_(value.requires_grad)


def _sample(value: Any, i: int) -> Any:
    if isinstance(value, list):
        return [_sample(v, i) for v in value]
    batched = isinstance(value, Tensor) and value.shape[:1] == (BATCH,)
    if not batched:
        return value
    return value[i : i + 1].detach().requires_grad_(value.requires_grad)
