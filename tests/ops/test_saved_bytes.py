"""Bytes that an op saves for backward, and its peak memory."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.support.cases import OPS, each, every_case
from tests.support.dispatch_modes import RecordingMode
from vlm_fast.devtools.memory import peak_bytes
from vlm_fast.verification import tolerance

MLP, MERGE, GATHER = (OPS[n] for n in ("mlp", "merge_image_tokens", "gather_image_tokens"))
LLAVA = dict(shape=(1, 577, 1024), drop_first=1, hidden=4096, out=4096)


def saved_bytes(call, args, options, *, parameters=()):
    """Bytes of the storages that autograd saves for one call, without those of ``parameters``."""
    args = tolerance.convert(args, lambda t: t.detach().requires_grad_())
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(*args, **options)
    assert any(r.requires_grad for r in each(result))
    for i in parameters:
        storages.pop(args[i].untyped_storage()._cdata, None)
    return sum(storages.values())


def mlp_ratio(saved, shape):
    args, options = MLP.sample(shape)
    eager = saved_bytes(MLP.reference, args, options, parameters=(1, 2, 3, 4))
    return saved_bytes(MLP, args, {**options, "saved": saved}, parameters=(1, 2, 3, 4)) / eager


@pytest.mark.parametrize(
    "saved, most", [("all", 1.0), ("preactivation", 0.56), ("input", 0.12)], ids=str
)
@pytest.mark.parametrize("cls_row", ["without a CLS row", "CLS row dropped"])
def test_mlp_saves_less_than_eager(saved, most, cls_row):
    shape = LLAVA if cls_row == "CLS row dropped" else {**LLAVA, "shape": (576, 1024)}
    shape = {**shape, "drop_first": shape["drop_first"] * (cls_row == "CLS row dropped")}
    assert mlp_ratio(saved, shape) <= most


@pytest.mark.parametrize("saved, most", [("preactivation", 0.56), ("input", 0.12)], ids=str)
def test_mlp_saves_less_than_eager_for_several_images(saved, most):
    """The GEMM runs over the gaps between images and saves their few rows too."""
    assert mlp_ratio(saved, {**LLAVA, "shape": (4, 577, 256), "hidden": 1024, "out": 64}) <= most


@pytest.mark.parametrize("as_list", [False, True], ids=["tensor", "list"])
def test_merge_saves_the_mask_and_four_bytes_per_row(as_list):
    batch, sequence, images, tokens = 3, 37, 2, 5
    shape = dict(batch=batch, sequence=sequence, hidden=64, images=images, tokens=tokens)
    args, options = MERGE.sample({**shape, "as_list": as_list})
    assert saved_bytes(MERGE, args, options) == batch * sequence + 4 * batch * images * tokens


def test_gather_saves_the_mask_and_four_bytes_per_row():
    shape = dict(batch=3, sequence=37, hidden=64, images=2, tokens=5, count=30)
    assert saved_bytes(GATHER, *GATHER.sample(shape)) == 3 * 37 + 4 * 30


@every_case
def test_registered_op_saves_the_same_bytes(op, shape):
    args, options = op.sample(shape)
    direct = saved_bytes(op, args, options)
    with RecordingMode():
        assert saved_bytes(op, args, options) == direct


def test_merge_allocates_no_temporary_of_hidden_size():
    """LLaVA's prefill of 8 prompts; ``masked_scatter`` needs about 9 bytes an element."""
    shape = MERGE.bench_shapes["LLaVA-1.5-7B, 8 x 2944"]
    args, options = MERGE.sample(shape, torch.bfloat16)
    most = peak_bytes(lambda: MERGE.fast(*args, **options), "cpu")
    size = args[0].nbytes
    assert size <= most <= 1.02 * size


@pytest.mark.parametrize("name", ["mlp", "gated_mlp"])
def test_backward_frees_saved_tensors_before_it_ends(name):
    """Weight gradients dominate the peak here; a retained graph cannot free saved tensors."""
    op = OPS[name]
    args, options = op.sample(dict(shape=(65, 48), hidden=256, out=256))
    args = tolerance.convert(args, lambda t: t.detach().requires_grad_())
    peaks = {}
    for call in (op, op.reference):
        for retain in (False, True):

            def step(call=call, retain=retain):
                result = call(*args, **options)
                upstream = torch.ones_like(result)
                return torch.autograd.grad(result, args, upstream, retain_graph=retain)

            step()
            peaks[call, retain] = peak_bytes(step, "cpu")
    assert peaks[op, False] <= peaks[op.reference, False]
    assert peaks[op, False] < peaks[op, True]
