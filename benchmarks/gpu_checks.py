"""Checks of the ops that need a GPU; each returns its failures, one line each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vlm_fast.devtools import tuning
from vlm_fast.devtools.passes import step, with_upstream
from vlm_fast.ops.declaration import FLOATS, OPS, Op
from vlm_fast.verification import self_test
from vlm_fast.verification.tolerance import convert, differentiable

Failures = list[str]
BATCH = 5  # of the large shapes; no other size is 5
# The largest tensor has more than 2^31 elements, so 32-bit offsets would overflow.
LARGE: dict[str, dict[str, Any]] = {
    "merge_image_tokens": {
        "batch": BATCH, "sequence": 107_000, "hidden": 4096, "images": 1, "tokens": 576,
    },
    "gather_image_tokens": {
        "batch": BATCH, "sequence": 107_000, "hidden": 4096, "images": 1, "tokens": 576,
        "count": BATCH * 576,
    },
    "anyres_pack": {"batch": BATCH, "side": 54, "hidden": 4100, "sizes": ((324, 324),)},
    "anyres_pack_resized": {
        "batch": BATCH, "side": 54, "hidden": 4100, "sizes": ((324, 324),), "most": 9,
    },
    "anyres_merge": {
        "batch": BATCH, "side": 54, "hidden": 4100, "sizes": ((324, 324),), "text": 576,
    },
    "cross_attention": {"batch": BATCH, "heads": 16, "shape": (64, 107_000), "d": 64},
    "absorbed_cross_attention": {
        "batch": BATCH, "queries": 32, "keys": 4096, "width": 114_688, "features": 64,
        "heads": 1,
    },
    "add_layer_norm": {"shape": (BATCH, 107_000, 4096)},
    "self_attention": {
        "batch": BATCH, "tokens": 2176, "width": 64, "features": 70_016, "heads": 1094,
    },
    "stacked_linear": {"shape": (BATCH, 107_000, 64), "outs": (2048, 2048)},
    "max_similarity": {"shape": (BATCH, 107_000, 4096), "texts": 64},
    "mlp": {"shape": (BATCH, 107_000, 64), "hidden": 4096, "out": 64},
    "act_linear": {"shape": (BATCH, 107_000, 4096), "out": 64},
    "mlp_merge": {
        "batch": BATCH, "sequence": 107_000, "images": 1, "tokens": 576, "inner": 64,
        "middle": 64, "hidden": 4096,
    },
    "gated_mlp": {"shape": (BATCH, 107_000, 64), "hidden": 4096, "out": 64},
    "gated_add": {"shape": (BATCH, 107_000, 4096)},
    "gated_add_norm": {"shape": (BATCH, 107_000, 4096)},
    "media_cross_attention": {
        "batch": BATCH, "heads": 16, "queries": 107_000, "media": 16, "keys": 1024,
        "tokens_per_media": 64, "d": 64,
    },
    "pixel_shuffle_norm": {
        "batch": BATCH, "height": 460, "width": 460, "features": 2048, "norm": "layer",
    },
    "spatial_pool": {"batch": BATCH, "height": 460, "width": 460, "features": 2048},
    "bipartite_match": {"batch": BATCH, "tokens": 107_000, "features": 4096, "r": 53_000},
    "merge_tokens": {
        "batch": BATCH, "tokens": 107_000, "features": 4096, "r": 53_000, "sized": True,
    },
    "unmerge_tokens": {"batch": BATCH, "tokens": 107_000, "features": 4096, "r": 53_000},
}  # fmt: skip
# The index tables of these ops span all samples, so a part is taken along the features instead.
BY_FEATURES = {"anyres_pack", "anyres_pack_resized", "anyres_merge"}
# Ops without a GEMM: their parts must be equal to the last bit.
EXACT = {
    "merge_image_tokens", "gather_image_tokens", "add_layer_norm", "merge_tokens", "unmerge_tokens",
    "pixel_shuffle_norm", "spatial_pool", *BY_FEATURES,
}  # fmt: skip
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
        if name not in LARGE:
            failures.append(f"{name}: no large shape is named for it")
            continue
        torch.manual_seed(0)
        args, options = op.sample(LARGE[name], torch.bfloat16, device)
        inputs = with_upstream(op, args, options)
        whole = step(op.fast, inputs, options)
        sample, part = (_share, _share) if name in BY_FEATURES else (_sample, _part)
        for i in range(BATCH):
            alone = {k: v // BATCH if k == "count" else v for k, v in options.items()}
            args = tuple(sample(value, i) for value in inputs[:-1])
            upstream = [t if t is None else part(t, i) for t in inputs[-1]]
            parts = step(op.fast, (*args, upstream), alone)
            for j, (expected, found) in enumerate(zip(parts, whole, strict=True)):
                if found.numel() != BATCH * expected.numel():
                    continue  # the gradient of a weight: a sum over the samples
                # A GEMM with another number of rows may sum in another order.
                allowed = 0.0 if name in EXACT else 2**-6 * expected.abs().max().item()
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


def every_config(
    device: str, deadline: float, names: Iterable[str] | None = None
) -> tuple[list[tuning.Candidate], Failures]:
    """Every config of every kernel, in bf16: a table may name any of them."""
    candidates, failures = [], []
    for candidate in tuning.prove(names, device=device, deadline=deadline):
        candidates.append(candidate)
        failures += [
            f"{line}, with config {candidate.config} of {candidate.kernel}"
            for line in candidate.failures
        ]
    return candidates, failures
