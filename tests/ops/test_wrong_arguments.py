"""Mistakes of the caller: an error that names op, argument, value and expectation, and no work."""

import inspect

import pytest
import torch

from tests.support.cases import OPS, any_op, usual_shape
from vlm_fast.verification import tolerance

MERGE, GATHER, MLP = (OPS[name] for name in ("merge_image_tokens", "gather_image_tokens", "mlp"))
PACK, RESIZED, PACK_MERGE = (
    OPS[name] for name in ("anyres_pack", "anyres_pack_resized", "anyres_merge")
)


NO_MISTAKES = [
    ("add_layer_norm", "seed", "no dimension"),
    ("cross_attention", "seed", "no dimension"),
    ("gated_add", "gate", "one dimension more"),
    ("gated_add", "gate", "no dimension"),
    ("gated_add_norm", "gate", "one dimension more"),
    ("gated_add_norm", "gate", "no dimension"),
    ("gated_mlp", "x", "one dimension more"),
    ("act_linear", "z", "one dimension more"),
    ("mlp", "x", "one dimension more"),
    ("bipartite_match", "metric", "one feature more"),
    ("merge_tokens", "x", "one feature more"),
    ("unmerge_tokens", "merged", "one feature more"),
    ("pixel_shuffle_norm", "x", "one dimension more"),
    ("spatial_pool", "x", "one dimension more"),
    ("spatial_pool", "x", "one feature more"),
    ("stacked_linear", "x", "one dimension more"),
    ("merge_image_tokens", "image_features", "one dimension more"),
    ("gather_image_tokens", "hidden_states", "one feature more"),
    *(
        (name, "features", "one dimension more")
        for name in ("anyres_pack", "anyres_pack_resized", "anyres_merge")
    ),
    ("anyres_pack", "source", "one feature more"),  # another packed row
    ("anyres_merge", "source", "one feature more"),  # counted later, against the mask
]


def tensors_of(value):
    return [t for v in value for t in (v if isinstance(v, list) else [v]) if t is not None]


def assert_refused(op, args, options, exceptions, *words):
    """Both `op` and `op.fast` raise, say the words, and neither compute nor change anything."""
    before = [t.clone() for t in tensors_of(args) if isinstance(t, torch.Tensor)]
    for call in (op, op.fast):
        with pytest.raises(exceptions) as error:
            call(*args, **options)
        assert type(error.value) in (exceptions if isinstance(exceptions, tuple) else (exceptions,))
        message = str(error.value)
        assert message.startswith(f"vlm_fast.{op.name}: ")
        assert "expected" in message and all(word in message for word in words), message
    for tensor, copy in zip(
        [t for t in tensors_of(args) if isinstance(t, torch.Tensor)], before, strict=True
    ):
        assert tensor.is_meta or torch.equal(tensor, copy)


@pytest.fixture
def no_work(monkeypatch):
    for op in OPS.values():
        monkeypatch.setattr(op._path, "forward", lambda *a, **k: pytest.fail("work was begun"))


def each_argument(op):
    """Options, and for each argument its name, value and how to replace it; of a list the first.

    Not those that the shape leaves out, nor the seed, which nothing reads without dropout.
    """
    args, options = op.sample(usual_shape(op))
    for i, name in enumerate(op.tensors):
        value = args[i]
        if value is None or name == "seed":
            continue

        def replaced(new, i=i, value=value):
            new = [new, *value[1:]] if isinstance(value, list) else new
            return (*args[:i], new, *args[i + 1 :])

        yield name, value[0] if isinstance(value, list) else value, replaced, options


@pytest.mark.parametrize("wrong", ["words", 3, [1.5]], ids=repr)
@any_op
def test_what_is_no_tensor(op, wrong, no_work):
    for name, _, replaced, options in each_argument(op):
        assert_refused(op, replaced(wrong), options, TypeError, name)


@any_op
def test_what_is_missing(op, no_work):
    args, options = op.sample(usual_shape(op))
    parameters = op.__signature__.parameters
    required = [name for name in op.tensors if parameters[name].default is inspect.Parameter.empty]
    for call in (op, op.fast):
        with pytest.raises(TypeError, match=required[-1]):
            call(*args[: len(required) - 1], **options)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64, torch.bool], ids=str)
@any_op
def test_dtypes_without_meaning(op, dtype, no_work):
    for name, value, replaced, options in each_argument(op):
        if value is not None and value.dtype != dtype:
            assert_refused(op, replaced(value.to(dtype)), options, TypeError, name, str(dtype))


@pytest.mark.parametrize("op", [pytest.param(o, id=n) for n, o in OPS.items() if o.tensors[1:]])
def test_another_device(op, no_work):
    for _, value, replaced, options in each_argument(op):
        if value is not None:
            assert_refused(op, replaced(value.to("meta")), options, ValueError, "meta", "cpu")


@pytest.mark.parametrize("change", ["one feature more", "one dimension more", "no dimension"])
@any_op
def test_shapes_that_do_not_fit(op, change, no_work):
    told = 0
    for name, value, replaced, options in each_argument(op):
        if value is None:
            continue
        if change == "one feature more":
            wrong = torch.cat([value, value[..., :1]], -1)
        else:
            wrong = value[None] if change == "one dimension more" else value.flatten()[0]
        if any(op.name == o and name == n and change == c for o, n, c in NO_MISTAKES):
            told += 1
            continue
        # The error may name the other side of the mismatch.
        assert_refused(op, replaced(wrong), options, ValueError)
        told += 1
    assert told or len(op.tensors) == 1


@any_op
def test_unknown_options(op, no_work):
    args, options = op.sample(usual_shape(op))
    for call in (op, op.fast):
        with pytest.raises(TypeError, match="flavour"):
            call(*args, **options, flavour="vanilla")


MISTAKES = {
    "mixed dtypes": (MLP, {"weight_2": lambda t: t.bfloat16()}, TypeError, "weight_2 bfloat16"),
    "wrong inner size": (MLP, {"weight_1": lambda t: t[:, 1:]}, ValueError, "weight_1 (5, 16) 17"),
    "hidden sizes": (MLP, {"weight_2": lambda t: t[:, 1:]}, ValueError, "weight_2 (9, 4) weight_1"),
    "bias that broadcasts": (MLP, {"bias_1": lambda t: t[:1]}, ValueError, "bias_1 (1,) (5,)"),
    "bias of two dimensions": (MLP, {"bias_2": lambda t: t[None]}, ValueError, "bias_2 (1, 9)"),
    "weights missing": (MLP, {"weight_1": lambda t: None}, TypeError, "weight_1 NoneType"),
    "rows beyond the mask": (
        MERGE, {"image_features": lambda t: t.repeat(10, 1, 1)}, ValueError, "image_features 150",
    ),
    "one row too many": (
        MERGE, {"image_features": lambda t: [t, t[0, :1]]}, ValueError, "image_features 16 15",
    ),
    "one row too few": (
        MERGE, {"image_features": lambda t: t.flatten(0, 1)[1:]}, ValueError, "image_features 14",
    ),
    "one of a list": (
        MERGE, {"image_features": lambda t: [t[0], t[1, :, 1:]]}, ValueError, "image_features[1]",
    ),
    "mask of another sequence": (
        MERGE, {"image_mask": lambda t: t[:, 1:]}, ValueError, "image_mask (3, 36) (3, 37)",
    ),
    "newline of another width": (
        PACK, {"image_newline": lambda t: t[1:]}, ValueError, "image_newline (16,) (17,)",
    ),
    "newline that broadcasts": (PACK, {"image_newline": lambda t: t[:1]}, ValueError, "(1,) (17,)"),
    "tiles of another plan": (PACK, {"features": lambda t: t[1:]}, ValueError, "target 32"),
    "tables of another width": (PACK, {"source": lambda t: t[:, None]}, ValueError, "source rows"),
    "wide tables": (PACK, {"target": lambda t: t.long()}, TypeError, "target int64 int32"),
    "packed without rows": (
        PACK, {"features": lambda t: t[:0], "target": lambda t: t[:0]}, ValueError, "source no row",
    ),
    "resized tiles of another plan": (
        RESIZED, {"features": lambda t: t[1:]}, ValueError, "targets (40, 4) (36, 4)",
    ),
    "weights of other taps": (RESIZED, {"weights": lambda t: t[1:]}, ValueError, "weights"),
    "three taps": (RESIZED, {"taps": lambda t: t[:, 1:]}, ValueError, "taps 3 4"),
    "packed rows beyond the mask": (
        PACK_MERGE, {"source": lambda t: t.repeat(4)}, ValueError, "source image_mask",
    ),
    "packed rows of another mask": (
        PACK_MERGE, {"source": lambda t: t[1:]}, ValueError, "source image_mask",
    ),
    "features of another width": (
        PACK_MERGE, {"features": lambda t: t[..., 1:], "image_newline": lambda t: t[1:]},
        ValueError, "features inputs_embeds 16 17",
    ),
    "sequence without batch": (
        GATHER, {"hidden_states": lambda t: t[0]}, ValueError, "hidden_states (37, 17) hidden",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    op, changes, exception, words = MISTAKES[mistake]
    args, options = op.sample(usual_shape(op))
    named = dict(zip(op.tensors, args, strict=True))
    args = [changes.get(name, lambda t: t)(value) for name, value in named.items()]
    assert_refused(op, args, options, exception, *words.split())


@pytest.mark.parametrize("option, value", [("activation", "swish"), ("saved", "everything")])
def test_unknown_values_of_options(option, value, no_work):
    args, options = MLP.sample(usual_shape(MLP))
    assert_refused(MLP, args, {**options, option: value}, ValueError, option, repr(value), "one of")


@pytest.mark.parametrize("count", [-1, 14, 16, 112])
def test_counts_that_do_not_fit_the_mask(count):
    args, options = GATHER.sample(usual_shape(GATHER))
    assert_refused(GATHER, args, {**options, "count": count}, ValueError, "count", str(count))


def test_a_wrong_count_leaves_no_trace():
    """After the error the same arguments, corrected, give the right result and gradients."""
    (embeds, features, mask), options = MERGE.sample(usual_shape(MERGE))
    with pytest.raises(ValueError, match="image_features"):
        MERGE(embeds, features[1:], mask)
    assert all(v.ok for v in tolerance.check(MERGE, (embeds, features, mask), options))
