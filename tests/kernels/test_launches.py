"""The kernels that ops and models launch: ATen kernels and our recorded launches."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vlm_fast
from tests.support.cases import DIFFERENTIABLE
from tests.support.tiny_qformers import blip2
from vlm_fast.kernels import _launcher
from vlm_fast.kernels._launcher import recording
from vlm_fast.ops.declaration import OPS

pytestmark = pytest.mark.devices("interpreter")

FREE = {"_unsafe_view", "detach", "lift_fresh"}


class Launches(TorchDispatchMode):
    """Count the ATen ops that launch a kernel; views and allocations are excluded."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vlm_fast":  # not counted as an op: its launches are recorded
            with self:
                return OPS[func._opname]._path._run(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = func._opname
        if not (is_view or name.startswith(("empty", "new_empty")) or name in FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches(model, **given):
    with torch.no_grad(), recording() as recorded, Launches() as seen:
        model(**given)
    return len(seen.names) + len(recorded)


def test_qformer_launches_at_most_three_quarters_of_transformers_kernels(monkeypatch):
    # The same number of layers as BLIP-2. The count does not depend on the widths.
    sizes = dict(
        hidden_size=16, num_attention_heads=1, intermediate_size=16, num_hidden_layers=12,
        encoder_hidden_size=16,
    )  # fmt: skip
    model = blip2(**sizes).bfloat16()
    given = dict(
        query_embeds=torch.randn(1, 17, 16, dtype=torch.bfloat16),
        encoder_hidden_states=torch.randn(1, 3, 16, dtype=torch.bfloat16),
    )
    # Launches are recorded but not run, so that the interpreter's own work is not counted.
    monkeypatch.setattr(_launcher, "is_traced", lambda tensor: True)
    before = launches(model, **given)
    vlm_fast.patch(model, strict=True)
    with vlm_fast.strict():
        after = launches(model, **given)
    assert before == 187  # 96 products, 18 of attention, 31 norms, 30 sums, 12 of GELU
    # Twelve self-attentions of 6, six cross-attentions of 4, twelve MLPs of 3, and 3 before the
    # layers, of which one puts weights together.
    assert after == 135


ATTENTION = "query_gradient_kernel"
MEDIA = "media_query_gradient_kernel media_key_gradient_kernel"
MLP, SUM = "mlp_activation_backward_kernel", "sum_shares_kernel"
# For each op shapes, and all launches of a backward at this shape: our kernels, then ATen's. One
# row more is where the rows of some kernels become too many for one program.
BACKWARDS = {
    "act_linear": [
        (dict(shape=(257, 24), out=16), f"{MLP} {SUM} mm mm"),
        (dict(shape=(257, 24), out=16, gated=True), "gated_activation_backward_kernel mm sum mm"),
    ],
    "add_layer_norm": [
        (dict(shape=(32, 24), x_biased=True), "add_layer_norm_backward_kernel"),
        (dict(shape=(33, 24), x_biased=True), f"add_layer_norm_backward_kernel {SUM}"),
    ],
    "anyres_merge": [
        (None, "split_image_tokens_kernel pack_rows_kernel fill_gradient_kernel"),
    ],
    "anyres_pack": [
        (None, "pack_rows_kernel fill_gradient_kernel"),
        (
            dict(batch=2, side=8, hidden=5, sizes=((8, 8), (8, 8))),
            f"pack_rows_kernel fill_gradient_kernel {SUM}",
        ),
    ],
    "anyres_pack_resized": [(None, "blend_rows_kernel fill_gradient_kernel")],
    "cross_attention": [
        (dict(batch=1, heads=2, shape=(32, 257), d=64), ATTENTION),
        (dict(batch=1, heads=2, shape=(32, 677), d=64), f"{ATTENTION} add_shares_kernel"),
        # Many rows: the second kernel also adds the shares of the queries' gradient.
        (dict(batch=1, heads=2, shape=(96, 677), d=96), f"{ATTENTION} key_value_gradient_kernel"),
        (
            dict(batch=1, heads=4, kv_heads=1, shape=(64, 677), keys2=64, d=96, hidden=True),
            f"{ATTENTION} key_value_gradient_kernel",
        ),
    ],
    "gated_add": [
        (dict(shape=(32, 24)), "gated_add_backward_kernel"),
        (dict(shape=(33, 24)), f"gated_add_backward_kernel {SUM}"),
        (dict(shape=(33, 24), per_feature=True), f"gated_add_backward_kernel {SUM}"),
    ],
    "gated_add_norm": [
        (dict(shape=(32, 24), biased=True), "gated_add_backward_kernel"),
        (dict(shape=(33, 24), biased=True), f"gated_add_backward_kernel {SUM}"),
    ],
    "gated_mlp": [
        (None, "gated_activation_backward_kernel mm mm mm mm addmm_ mm"),
    ],
    "gather_image_tokens": [(None, "merge_image_tokens_kernel")],
    "max_similarity": [(None, "new_zeros _to_copy scatter_ mm mm")],
    "media_cross_attention": [
        (dict(batch=1, heads=2, queries=9, media=1, keys=5, tokens_per_media=5, d=16),
         MEDIA),
        (dict(batch=1, heads=2, queries=9, media=1, keys=5, tokens_per_media=5, d=16, normed=True),
         MEDIA + " " + SUM),
        (dict(batch=1, heads=2, queries=511, media=1, keys=64, tokens_per_media=64, d=64),
         "media_gradient_kernel"),
        (dict(batch=1, heads=2, queries=512, media=1, keys=64, tokens_per_media=64, d=64),
         "media_gradient_kernel add_shares_kernel"),
    ],
    "merge_image_tokens": [(None, "split_image_tokens_kernel")],
    "merge_tokens": [(dict(batch=3, tokens=7, features=17, r=3), "spread_tokens_kernel")],
    "mlp": [
        (dict(shape=(128, 24), hidden=40, out=16), f"{MLP} mm mm mm mm"),
        (dict(shape=(129, 24), hidden=40, out=16), f"{MLP} {SUM} mm mm mm mm"),
    ],
    "norm_mlp": [
        (
            dict(shape=(8, 24), hidden=40, out=16),
            f"{MLP} mm mm mm mm native_layer_norm_backward",
        ),
        (
            dict(shape=(32, 24), hidden=40, out=16, factor=2, norm="rms", norm_after=False),
            f"{MLP} pixel_shuffle_norm_backward_kernel mm mm mm mm",
        ),
    ],
    "pixel_shuffle_norm": [
        (
            dict(batch=2, height=4, width=4, features=17, norm="layer"),
            "pixel_shuffle_norm_backward_kernel",
        ),
        (
            dict(batch=2, height=4, width=6, features=17, norm="layer"),
            f"pixel_shuffle_norm_backward_kernel {SUM}",
        ),
    ],
    "qformer_layer": [(
        None,
        f"add_layer_norm_backward_kernel {MLP} add_layer_norm_backward_kernel {ATTENTION} {SUM} "
        f"add_layer_norm_backward_kernel {ATTENTION} {SUM} "
        "mm mm mm addmm mm mm mm addmm mm mm mm mm mm cat addmm",
    )],
    "self_attention": [(None, f"{ATTENTION} {SUM} cat mm mm split_with_sizes_copy")],
    "spatial_pool": [(None, "spatial_pool_backward_kernel")],
    "stacked_linear": [(None, f"{SUM} cat mm mm split_with_sizes_copy")],
    "unmerge_tokens": [(None, "sum_tokens_kernel")],
}  # fmt: skip


def test_every_backward_is_counted():
    assert BACKWARDS.keys() == DIFFERENTIABLE.keys()


@pytest.mark.parametrize(
    "name, shape, expected",
    [pytest.param(n, *c, id=f"{n}-{i}") for n, cases in BACKWARDS.items()
     for i, c in enumerate(cases)],
)  # fmt: skip
def test_a_backward_launches_no_more_than_its_kernels(name, shape, expected, monkeypatch):
    """No sum and no conversion that a kernel's store could do."""
    op = OPS[name]
    path = op._path
    args, options = op.sample(shape or op.usual_shape, torch.bfloat16)
    settings = {**op.defaults, **options}
    values = op.accepted(args, settings)
    flat = [v is not None and v.is_floating_point() for v in path.flatten(values)]
    needs = path.needs_of(tuple(flat), path.count(values))
    with torch.no_grad():
        result, saved = path.forward(needs, *values, **settings)
        results = result if isinstance(result, tuple) else (result,)
        upstream = [torch.randn_like(r) for r in results]
        # Launches are recorded but not run, so that the interpreter's own work is not counted.
        monkeypatch.setattr(_launcher, "is_traced", lambda tensor: True)
        with recording() as recorded, Launches() as seen:
            path.backward(needs, iter(saved), *upstream, **settings)
    assert " ".join([launch.kernel.name for launch in recorded] + seen.names) == (
        " ".join(expected.split())
    )
