"""Implementations of an op by other libraries: availability, reasons for absence, correctness."""

import sys
import types

import torch

from vlm_fast.benchmarks import ops, providers
from vlm_fast.benchmarks.providers.peer import Unavailable
from vlm_fast.ops.declaration import OPS


def test_each_op_has_rows_and_each_absent_library_a_reason(monkeypatch):
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    for op in OPS.values():
        (_, shape), *_ = ops.shapes_of(op, "cpu", quick=True)
        args, options = op.sample(shape, torch.float32, "cpu")
        found = providers.of(op, args, options, "cpu")
        assert list(found)[:2] == [providers.OURS, providers.EAGER]
        for peer in providers.PEERS:
            if peer.op == op.name and (peer.package or peer.cuda_only):
                reason = f"{peer.package} is not installed" if peer.package else "for GPUs only"
                assert str(found[peer.name]).endswith(reason)
    assert {peer.op for peer in providers.PEERS} <= OPS.keys()


def test_provider_results_match_ours():
    for peer in providers.PEERS:
        op = OPS[peer.op]
        (_, shape), *_ = ops.shapes_of(op, "cpu", quick=True)
        args, options = op.sample(shape, torch.float32, "cpu")
        function = providers.of(op, args, options, "cpu")[peer.name]
        if not isinstance(function, Unavailable):
            torch.testing.assert_close(function(*args, **options), op(*args, **options))


def library(monkeypatch, name, **functions):
    """A fake module of a library that is not installed, whose functions compute with ATen."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:i]))
        module.__spec__ = types.SimpleNamespace(name=module.__name__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for key, value in functions.items():
        setattr(module, key, value)


def applied(function):
    return types.SimpleNamespace(apply=function)


def test_adapters_pass_arguments_libraries_accept(monkeypatch):
    f = torch.nn.functional
    library(
        monkeypatch, "liger_kernel.ops.layer_norm",
        LigerLayerNormFunction=applied(lambda x, w, b, eps: f.layer_norm(x, w.shape, w, b, eps)),
    )  # fmt: skip
    library(
        monkeypatch, "liger_kernel.ops.rms_norm",
        LigerRMSNormFunction=applied(
            lambda x, w, eps, offset, mode, in_place: f.rms_norm(x, w.shape, w, eps)
        ),
    )  # fmt: skip
    library(
        monkeypatch, "liger_kernel.ops.swiglu",
        LigerSiLUMulFunction=applied(lambda a, b: f.silu(a) * b),
    )  # fmt: skip
    library(
        monkeypatch, "apex.normalization.fused_layer_norm",
        fused_layer_norm_affine=lambda x, w, b, shape, eps: f.layer_norm(x, shape, w, b, eps),
    )  # fmt: skip
    library(
        monkeypatch, "quack.mlp",
        mlp_func=lambda x, w1, w2, act, b1, b2: f.linear(f.gelu(f.linear(x, w1, b1)), w2, b2),
    )  # fmt: skip

    def by_tokens(q, k, v, scale=None, softmax_scale=None):
        moved = [t.transpose(1, 2) for t in (q, k, v)]
        out = f.scaled_dot_product_attention(*moved, scale=scale or softmax_scale)
        return out.transpose(1, 2)

    library(monkeypatch, "xformers.ops", memory_efficient_attention=by_tokens)
    library(monkeypatch, "flash_attn", flash_attn_func=by_tokens)
    served = set()
    for peer in providers.PEERS:
        op = OPS[peer.op]
        if peer.package is None or peer.name == "flash-attn (tanh)":
            continue
        for shape in op.test_shapes:
            args, options = op.sample(shape, torch.float32, "cpu")
            try:
                function = peer.make(*args, **options)
            except (Unavailable, ModuleNotFoundError):
                continue
            served.add((peer.name, peer.op))
            torch.testing.assert_close(
                function(*args, **options), op.reference(*args, **options), rtol=1e-4, atol=1e-4
            )
    assert served == {
        ("xformers", "cross_attention"), ("flash-attn", "cross_attention"),
        ("Liger", "add_layer_norm"), ("Apex", "add_layer_norm"), ("Liger", "gated_mlp"),
        ("Liger (LayerNorm)", "gated_add_norm"), ("Liger (RMSNorm)", "gated_add_norm"),
        ("Liger (LayerNorm)", "pixel_shuffle_norm"), ("Liger (RMSNorm)", "pixel_shuffle_norm"),
        ("QuACK", "mlp"),
    }  # fmt: skip
