"""Ops in autograd: saved tensors, double backward, checkpointing, transforms, hooks."""

import contextlib
import functools
import itertools
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import vlm_fast
from tests.support.cases import OPS, each, every_case, every_op
from tests.support.dispatch_modes import RecordingMode
from vlm_fast.ops.declaration import with_batch
from vlm_fast.verification import tolerance


def leaves(op, shape):
    args, options = op.sample(shape)
    return tolerance.convert(args, lambda t: t.detach().requires_grad_()), options


def total(result):
    """A scalar that depends on every element of every result with its own weight."""
    return sum((r * tolerance.random_upstream(r)).sum() for r in each(result))


def gradients(function, args):
    return torch.autograd.grad(total(function(*args)), tolerance.differentiable(args))


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("registered", [False, True], ids=["direct", "registered"])
@every_op
def test_double_backward_raises(op, registered):
    args, options = leaves(op, op.usual_shape)
    if registered:
        with RecordingMode():
            result = op(*args, **options)
    else:
        result = op(*args, **options)
    with pytest.raises(RuntimeError, match=f"{op.name}.*double backward"):
        first = torch.autograd.grad(
            total(result), tolerance.differentiable(args), create_graph=True
        )
        torch.autograd.grad(sum(g.square().sum() for g in first), tolerance.differentiable(args))


@every_op
def test_forward_mode_raises(op):
    args, options = op.sample(op.usual_shape)
    with forward_ad.dual_level():
        dual = tolerance.convert(args, lambda t: forward_ad.make_dual(t, torch.ones_like(t)))
        for call in (op, op.fast):
            with pytest.raises(RuntimeError, match=f"{op.name}.*forward-mode"):
                call(*dual, **options)
    first, rest = args[0], args[1:]
    for call in (op, op.fast):
        with pytest.raises(RuntimeError, match=f"{op.name}.*forward-mode"):
            torch.func.jvp(lambda x: call(x, *rest, **options), (first,), (first,))  # noqa: B023
    with vlm_fast.disabled():  # as the error message recommends
        ours = torch.func.jvp(lambda x: op(x, *rest, **options), (first,), (first,))
    theirs = torch.func.jvp(lambda x: op.reference(x, *rest, **options), (first,), (first,))
    assert_equal(each(ours), each(theirs))


@pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")
@every_op
def test_torch_func_transforms_use_the_reference(op):
    args, options = op.sample(op.usual_shape)
    first, rest = args[0], args[1:]

    def results(call):
        value = lambda x: total(call(x, *rest, **options))  # noqa: E731
        plain = lambda x: call(x, *rest, **options)  # noqa: E731
        yield torch.func.grad(value)(first)
        yield from each(torch.func.vmap(plain)(torch.stack([first, 2 * first])))

    assert_equal(results(op), results(op.reference))
    assert sum(vlm_fast.stats()[op.name]["fallback"].values()) == 2


def flattened(op, args, options):
    """The op as a function of flat tensors: checkpoint and gradcheck do not accept lists."""

    def flat(*tensors):
        tensors = iter(tensors)
        nested = [
            [next(tensors) for _ in a] if isinstance(a, list) else next(tensors) for a in args
        ]
        return op(*nested, **options)

    return flat, [t for a in args for t in (a if isinstance(a, list) else [a])]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@every_case
def test_checkpointing_gives_the_same_gradients(op, shape, reentrant):
    args, options = leaves(op, shape)
    flat, tensors = flattened(op, args, options)
    again = lambda *_: checkpoint(flat, *tensors, use_reentrant=reentrant)  # noqa: E731
    inputs = tolerance.differentiable(args)
    expected = gradients(lambda *a: op(*a, **options), args)
    total(again()).backward()  # reentrant checkpointing does not support autograd.grad
    assert_equal([t.grad for t in inputs], expected)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@every_op
def test_selective_checkpointing_follows_its_policy(op, kept, monkeypatch):
    args, options = leaves(op, op.usual_shape)
    flat, tensors = flattened(op, args, options)
    expected = gradients(lambda *a: op(*a, **options), args)
    wanted = CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.MUST_RECOMPUTE
    value, seen = selectively_checkpointed(op._path.registered, wanted, flat, *tensors)
    runs, forward = [], op._path.forward
    monkeypatch.setattr(op._path, "forward", lambda *a, **k: runs.append(1) or forward(*a, **k))
    assert_equal(torch.autograd.grad(total(value), tolerance.differentiable(args)), expected)
    assert len(runs) <= (not kept)  # nothing is recomputed if backward needs nothing
    # Some torch releases call the policy again when they recompute.
    x = torch.ones(2, requires_grad=True)
    exponential, policy_calls = selectively_checkpointed(
        torch.ops.aten.exp.default, wanted, torch.exp, x
    )
    exponential.sum().backward()
    assert seen[0] is False and seen == policy_calls[: len(seen)]  # nothing is saved


def selectively_checkpointed(wished, wanted, call, *tensors):
    """The result, and for each policy call whether it came from the recomputation."""
    seen = []

    def policy(context, function, *_, **__):
        if function is wished:
            seen.append(context.is_recompute)
        return wanted if function is wished else CheckpointPolicy.MUST_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(call, *tensors, use_reentrant=False, context_fn=contexts), seen


@every_op
def test_reference_gradients_match_finite_differences(op):
    args, options = leaves(op, op.usual_shape)
    args = tolerance.convert(args, lambda t: t.detach().double().requires_grad_())
    flat, tensors = flattened(op.reference, args, options)
    differentiable = tolerance.differentiable(args)

    def value(*moved):
        moved = iter(moved)
        return each(flat(*(next(moved) if any(t is d for d in differentiable) else t
                           for t in tensors)))  # fmt: skip

    def of_floats(*moved):
        return tuple(r for r in value(*moved) if r.is_floating_point())

    assert torch.autograd.gradcheck(of_floats, differentiable, fast_mode=True, atol=1e-4)


@every_case
def test_backward_twice_is_bitwise_equal(op, shape):
    args, options = leaves(op, shape)
    inputs = tolerance.differentiable(args)
    value = total(op(*args, **options))
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    assert_equal(torch.autograd.grad(value, inputs), first)


@every_case
def test_mutating_a_saved_tensor_raises(op, shape):
    """Mutating an argument raises, or does not matter because it was not saved."""
    args, options = leaves(op, shape)
    raised = 0
    for at in range(len(tensors_of(args))):
        mutable = nested_map(args, torch.clone)  # leaves cannot be written in place
        value = total(op(*mutable, **options))
        expected = torch.autograd.grad(value, tolerance.differentiable(args), retain_graph=True)
        victim = tensors_of(mutable)[at]
        with torch.no_grad():
            victim.logical_not_() if victim.dtype == torch.bool else victim.add_(1)
        try:
            found = torch.autograd.grad(value, tolerance.differentiable(args))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            raised += 1
        else:
            assert_equal(found, expected)
    assert raised or not keeps_an_input(op, shape)


def keeps_an_input(op, shape):
    """Whether the op saves one of its inputs; ops that only move rows need not."""
    args, options = op.sample(shape)
    settings = {**op.defaults, **options}
    values = op.accepted(args, settings)
    needs = op.NeedsGrad(*[bool(tolerance.differentiable([v])) for v in values])
    kept = op._path.forward(needs, *values, **settings)[1]
    inputs = {t.untyped_storage()._cdata for t in tensors_of(values)}
    return any(t is not None and t.untyped_storage()._cdata in inputs for t in kept)


def tensors_of(args):
    flat = [t for a in args for t in (a if isinstance(a, list) else [a])]
    return [t for t in flat if isinstance(t, torch.Tensor)]


def nested_map(args, change):
    return tuple(
        [change(v) for v in a] if isinstance(a, list) else a if a is None else change(a)
        for a in args
    )


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
@every_case
def test_no_grad_keeps_no_tensors(op, shape, mode):
    with mode():
        args, options = leaves(op, shape)
        result = op(*args, **options)
    watched = [weakref.ref(t) for t in tensors_of(args)]
    del args
    assert all(not r.requires_grad and r.grad_fn is None for r in each(result))
    assert [w() for w in watched] == [None] * len(watched)


@every_case
def test_only_the_graph_keeps_inputs_alive(op, shape):
    args, options = leaves(op, shape)
    result = op(*args, **options)
    watched = [weakref.ref(t) for t in tensors_of(args)]
    del args
    assert any(w() is not None for w in watched)
    del result
    assert [w() for w in watched] == [None] * len(watched)


@pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")
@every_op
def test_zero_rows_give_zero_gradients(op):
    """As on a rank without images: an empty result, and zero gradients instead of None."""
    args, options = leaves(op, with_batch(op.usual_shape, 0))
    result = op(*args, **options)
    expected = op.reference(*args, **options)
    for ours, theirs in zip(each(result), each(expected), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert ours.requires_grad and ours.numel() == 0
    total(result).backward()
    for tensor in tolerance.differentiable(args):
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


@every_op
def test_keyword_tensors_get_gradients(op):
    args, options = leaves(op, op.usual_shape)
    by_keyword = lambda *a: op(**dict(zip(op.tensors, a, strict=True)), **options)  # noqa: E731
    assert_equal(gradients(by_keyword, args), gradients(lambda *a: op(*a, **options), args))


@every_case
def test_results_are_not_views(op, shape):
    """Results can be changed in place, as those of nn.Linear; FSDP2 does not accept views."""
    args, options = leaves(op, shape)
    result = op(*args, **options)
    expected = gradients(lambda *a: op(*a, **options), args)
    for one in each(result):
        assert not one._is_view()
        one.add_(1)
    try:
        found = torch.autograd.grad(total(result), tolerance.differentiable(args))
    except RuntimeError as error:  # one result is saved for the gradient of another
        assert len(each(result)) > 1 and "modified by an inplace operation" in str(error)
    else:
        assert_equal(found, expected)


def in_registered(registered):
    return RecordingMode() if registered else contextlib.nullcontext()


@pytest.mark.parametrize("registered", [False, True], ids=["direct", "registered"])
@every_op
def test_batched_gradients_match_a_loop(op, registered):
    args, options = leaves(op, op.usual_shape)
    inputs = tolerance.differentiable(args)
    with in_registered(registered):
        results = [r for r in each(op(*args, **options)) if r.requires_grad]

    def backward(*upstream):
        return torch.autograd.grad(results, inputs, upstream, retain_graph=True)

    upstream = [torch.stack([tolerance.random_upstream(r), r, 0 * r]).detach() for r in results]
    expected = [torch.stack(rows) for rows in zip(*map(backward, *upstream), strict=True)]
    found = torch.autograd.grad(
        results, inputs, upstream, is_grads_batched=True, retain_graph=True
    )  # fmt: skip
    assert_equal(found, expected)
    assert_equal(torch.vmap(backward)(*upstream), expected)
    with pytest.raises(RuntimeError, match=f"{op.name}.*double backward"):
        torch.autograd.grad(results, inputs, upstream, is_grads_batched=True, create_graph=True)


def test_vectorized_jacobian():
    x, gate = torch.randn(3, 4), torch.randn(4)

    def of(op):
        call = lambda x, gate: op(x, x.sin(), gate)  # noqa: E731
        return torch.autograd.functional.jacobian(call, (x, gate), vectorize=True)

    op = OPS["gated_add"]
    for one, other in zip(of(op), of(op.reference), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("registered", [False, True], ids=["direct", "registered"])
@every_case
def test_requires_grad_of_results_matches_reference(op, shape, registered):
    args, options = op.sample(shape)
    floating = [i for i, a in enumerate(args) if tolerance.differentiable([a])]
    for wanted in (c for n in range(3) for c in itertools.combinations(floating, n)):
        given = [
            tolerance.convert([a], lambda t: t.detach().requires_grad_())[0] if i in wanted else a
            for i, a in enumerate(args)
        ]
        with in_registered(registered):
            ours = [r.requires_grad for r in each(op(*given, **options))]
        assert ours == [r.requires_grad for r in each(op.reference(*given, **options))]
