"""Invalid calls raise errors that name op, argument, value and expectation, before any work.

Most cases follow from each op's declared signature; `MISTAKES` lists the others.
"""

import inspect

import numpy as np
import pytest
import torch

from tests.support.cases import OPS, declared_op
from vlm_fast.ops.signature import Signature
from vlm_fast.ops.signature_arguments import TensorArgument
from vlm_fast.verification import tolerance

MERGE, GATHER, MLP = (OPS[name] for name in ("merge_image_tokens", "gather_image_tokens", "mlp"))
PACK, RESIZED, PACK_MERGE = (
    OPS[name] for name in ("anyres_pack", "anyres_pack_resized", "anyres_merge")
)


def tensors_of(values):
    """All tensors among arguments, also those in lists."""
    flat = [t for v in values for t in (v if isinstance(v, list) else [v])]
    return [t for t in flat if isinstance(t, torch.Tensor)]


def assert_refused(op, args, options, exceptions, *words):
    """Check that `op` and `op.fast` raise with these words and compute and change nothing."""
    before = [t.clone() for t in tensors_of(args)]
    for call in (op, op.fast):
        with pytest.raises(exceptions) as error:
            call(*args, **options)
        assert type(error.value) in (exceptions if isinstance(exceptions, tuple) else (exceptions,))
        message = str(error.value)
        assert message.startswith(f"vlm_fast.{op.name}: ")
        assert "expected" in message and all(word in message for word in words), message
    for tensor, copy in zip(tensors_of(args), before, strict=True):
        assert tensor.is_meta or torch.equal(tensor, copy)


@pytest.fixture
def no_work(monkeypatch):
    for op in OPS.values():
        monkeypatch.setattr(op._path, "forward", lambda *a, **k: pytest.fail("work was begun"))


def each_tensor(op):
    """Yield each tensor's declaration, value, and a function that replaces it."""
    args, options = op.sample(op.usual_shape)
    args = op.accepted(args, {**op.defaults, **options})
    for i, (name, declared) in enumerate(op.signature.tensors.items()):
        if isinstance(declared, TensorArgument) and not declared.is_list:
            elements = [(declared, args[i], lambda new, i=i: (*args[:i], new, *args[i + 1 :]))]
        else:
            each = declared if isinstance(declared, list) else [declared] * len(args[i])
            elements = [
                (each[j], args[i][j], lambda new, i=i, j=j: (
                    *args[:i], [*args[i][:j], new, *args[i][j + 1 :]], *args[i + 1 :]
                ))
                for j in range(len(args[i]))
            ]  # fmt: skip
        for argument, value, replaced in elements:
            if value is not None:
                yield name, argument, value, replaced, options


@pytest.mark.parametrize("wrong", ["words", 3, [1.5]], ids=repr)
@declared_op
def test_non_tensor_raises(op, wrong, no_work):
    for name, _, _, replaced, options in each_tensor(op):
        assert_refused(op, replaced(wrong), options, TypeError, name)


@declared_op
def test_missing_argument_raises(op, no_work):
    args, options = op.sample(op.usual_shape)
    parameters = op.__signature__.parameters
    required = [name for name in op.tensors if parameters[name].default is inspect.Parameter.empty]
    for call in (op, op.fast):
        with pytest.raises(TypeError, match=required[-1]):
            call(*args[: len(required) - 1], **options)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64, torch.bool], ids=str)
@declared_op
def test_undeclared_dtype_raises(op, dtype, no_work):
    for name, argument, value, replaced, options in each_tensor(op):
        if str(dtype).removeprefix("torch.") not in argument.dtypes:
            assert_refused(op, replaced(value.to(dtype)), options, TypeError, name, str(dtype))


@pytest.mark.parametrize("op", [pytest.param(o, id=n) for n, o in OPS.items() if o.tensors[1:]])
def test_mixed_devices_raise(op, no_work):
    for _, _, value, replaced, options in each_tensor(op):
        assert_refused(op, replaced(value.to("meta")), options, ValueError, "meta", "cpu")


def shared_sizes(signature: Signature, argument: TensorArgument):
    """Negative indices of the sizes that another tensor, an option or a number determines."""
    others = [s for a in signature.flat() if a is not argument for s in a.sizes or ()]
    fixed = (argument.sizes or ())[1 if argument.leading else 0 :]
    for i, size in enumerate(reversed(fixed)):
        if not size.isidentifier() or size in others or size in signature.option_names:
            yield i + 1


@declared_op
def test_mismatched_size_raises(op, no_work):
    checked = 0
    for _, argument, value, replaced, options in each_tensor(op):
        for i in shared_sizes(op.signature, argument):
            if value.shape[-i] > 0:
                larger = torch.cat([value, value.narrow(-i, 0, 1)], -i)
                # The error may name either tensor.
                assert_refused(op, replaced(larger), options, ValueError)
                checked += 1
    shapes = [a.sizes for a in op.signature.flat() if a.sizes is not None]
    assert checked or len(shapes) == 1


@declared_op
def test_wrong_number_of_dimensions_raises(op, no_work):
    for _, argument, value, replaced, options in each_tensor(op):
        if argument.sizes is None:
            continue
        if argument.leading is None:
            assert_refused(op, replaced(value[None]), options, ValueError)
        if len(argument.sizes) - bool(argument.leading) > 0:
            assert_refused(op, replaced(value.flatten()[0]), options, ValueError)


@declared_op
def test_unknown_option_raises(op, no_work):
    args, options = op.sample(op.usual_shape)
    for call in (op, op.fast):
        with pytest.raises(TypeError, match="flavour"):
            call(*args, **options, flavour="vanilla")


def test_numpy_integers_are_integers():
    x = torch.randn(2, 35, 4)
    found = OPS["spatial_pool"](x, height=np.int64(5), width=np.int32(7), stride=np.int64(2))
    assert torch.equal(found, OPS["spatial_pool"](x, height=5, width=7, stride=2))


@declared_op
def test_option_out_of_range_raises(op, no_work):
    args, options = op.sample(op.usual_shape)
    for name, option in op.signature.options.items():
        if option.choices:
            wrong = [("vanilla", ValueError)]
        else:
            wrong = [("vanilla", TypeError), (True, TypeError)]
            wrong += [(option.least - 1, ValueError)] * (option.least > -float("inf"))
            wrong += [(option.below, ValueError)] * (option.below < float("inf"))
        for value, error in wrong:
            value = int(value) if option.integer and isinstance(value, float) else value
            assert_refused(op, args, {**options, name: value}, error, name, repr(value))


@declared_op
def test_compiled_predicate_accepts_test_shapes(op):
    """The compiled predicate accepts every test shape, so valid calls take the short check."""
    for shape in op.test_shapes:
        args, options = op.sample(shape)
        settings = {**op.defaults, **options}
        values = op.accepted(args, settings)
        assert op.signature.accepts(*values, **settings), shape


MISTAKES = {
    "mixed dtypes": (MLP, {"weight_2": lambda t: t.bfloat16()}, TypeError, "weight_2 bfloat16"),
    "wrong inner size": (MLP, {"weight_1": lambda t: t[:, 1:]}, ValueError, "weight_1 (5, 6) 7"),
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
    "tables of another width": (
        PACK, {"source": lambda t: t[:, None]}, ValueError, "source (packed,)",
    ),
    "wide tables": (PACK, {"target": lambda t: t.long()}, TypeError, "target int64 int32"),
    "packed without rows": (
        PACK, {"features": lambda t: t[:0], "target": lambda t: t[:0]}, ValueError, "source no row",
    ),
    "resized tiles of another plan": (
        RESIZED, {"features": lambda t: t[1:]}, ValueError, "targets (40, 4) 36",
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
def test_other_invalid_calls_raise(mistake):
    op, changes, exception, words = MISTAKES[mistake]
    args, options = op.sample(op.usual_shape)
    named = dict(zip(op.tensors, args, strict=True))
    args = [changes.get(name, lambda t: t)(value) for name, value in named.items()]
    assert_refused(op, args, options, exception, *words.split())


@pytest.mark.parametrize("count", [-1, 14, 16, 112])
def test_counts_that_do_not_match_the_mask_raise(count):
    args, options = GATHER.sample(GATHER.usual_shape)
    assert_refused(GATHER, args, {**options, "count": count}, ValueError, "count", str(count))


def test_wrong_count_leaves_no_state_behind():
    """After the error a corrected call gives the right result and gradients."""
    (embeds, features, mask), options = MERGE.sample(MERGE.usual_shape)
    with pytest.raises(ValueError, match="image_features"):
        MERGE(embeds, features[1:], mask)
    assert all(v.ok for v in tolerance.check(MERGE, (embeds, features, mask), options))
