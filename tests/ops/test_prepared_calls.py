"""A call like one that was checked is not checked again, and no other call passes for one."""

import contextlib

import pytest
import torch
from torch import nn

import vlm_fast
from tests.support.cases import OWN, any_op
from vlm_fast import ops
from vlm_fast.fallback import VlmFastFallbackError
from vlm_fast.kernels._host import host
from vlm_fast.ops import op_call, prepared_call

pytestmark = pytest.mark.skipif(host.describe is None, reason="the extension is not built")


def projector(rows=5):
    """Arguments of `ops.mlp`."""
    sizes = (rows, 24), (40, 24), (40,), (16, 40), (16,)
    return [torch.randn(*size) for size in sizes]


@pytest.fixture
def checks(monkeypatch):
    """A list that grows with every call whose arguments are checked."""
    calls = []
    for op in OWN.values():
        monkeypatch.setattr(op, "_prepared", {})
        accepts = op._accepts
        monkeypatch.setattr(
            op, "_accepts", lambda *a, f=accepts, **o: (calls.append(a), f(*a, **o))[1]
        )
    return calls


@any_op
def test_second_call_is_not_checked(op, checks):
    args, options = op.sample(op.usual_shape)
    first = op(*args, **options)
    count = len(checks)
    second = op(*args, **options)
    assert count > 0 and len(checks) == count
    torch.testing.assert_close(second, first, rtol=0, atol=0, equal_nan=True)


@any_op
def test_tensors_by_name_or_left_out_need_no_signature(op, checks, monkeypatch):
    args, options = op.sample(op.usual_shape)
    wanted = op(*args, **options)
    given = dict(zip(op.tensors, args, strict=True))
    monkeypatch.setattr(op, "__signature__", None)
    absent = {n for n, v in op._tensor_defaults.items() if v is given[n]}
    found = op(**{n: v for n, v in given.items() if n not in absent}, **options)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


CHANGES = {
    "rank": lambda a: [a[0].expand(2, 5, 24), *a[1:]],
    "dtype": lambda a: [a[0].double(), *a[1:]],
    "size": lambda a: [a[0], a[1][:, :20], *a[2:]],
    "absent": lambda a: [None, *a[1:]],
    "type": lambda a: ["x", *a[1:]],
    "sparse": lambda a: [a[0].to_sparse(), *a[1:]],
    "meta": lambda a: [v.to("meta") for v in a],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_other_tensors_are_checked(checks, change):
    args = projector()
    ops.mlp(*args)
    count, changed = len(checks), change(args)
    with contextlib.suppress(AttributeError, RuntimeError, TypeError, ValueError):
        ops.mlp(*changed)
    assert len(checks) > count


@pytest.mark.parametrize("r", [True, 2.0, "2"])
def test_equal_options_of_another_type_are_checked(checks, r):
    metric = torch.randn(2, 16, 8)
    ops.bipartite_match(metric, r=2 if r is not True else 1)
    with pytest.raises((TypeError, ValueError), match="bipartite_match: r"):
        ops.bipartite_match(metric, r=r)


def test_unhashable_option_is_refused_as_before():
    args = projector()
    ops.mlp(*args)
    with pytest.raises((TypeError, ValueError), match="activation"):
        ops.mlp(*args, activation=["gelu"])


def test_disabled_and_strict_hold_for_known_calls():
    args = projector()
    ops.mlp(*args)
    with vlm_fast.disabled():
        before = vlm_fast.stats()
        ops.mlp(*args)
        assert vlm_fast.stats() == before
    wide = [a.double() for a in args]
    with pytest.warns(vlm_fast.VlmFastFallbackWarning):
        ops.mlp(*wide)
    with vlm_fast.strict(), pytest.raises(VlmFastFallbackError):
        ops.mlp(*wide)


def test_known_calls_are_counted():
    args = projector()
    before = vlm_fast.stats().get("mlp", {"fast": 0})["fast"]
    for _ in range(3):
        ops.mlp(*args)
    assert vlm_fast.stats()["mlp"]["fast"] == before + 3


def test_autocast_is_obeyed_by_known_calls():
    args = projector()
    assert ops.mlp(*args).dtype is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.mlp(*args).dtype is torch.bfloat16


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_known_calls_cast_under_autocast(given, monkeypatch):
    """The arguments are cast as in a checked call, and autocast is on again after it."""
    args = [a.requires_grad_() for a in projector()]
    args[0] = args[0].detach().to(given)

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = ops.mlp(*args)
            assert torch.is_autocast_enabled("cpu")
        return found, *torch.autograd.grad(found.float().square().sum(), args[1:])

    first = step()
    monkeypatch.setattr(type(ops.mlp), "_checked", None)
    again = step()
    assert [x.dtype for x in again] == [torch.bfloat16] + [torch.float32] * 4
    assert all(map(torch.equal, first, again))


def test_autocast_is_on_again_after_an_error(monkeypatch):
    args = projector()
    ops.mlp(*args)

    def fails(*args, **options):
        raise MemoryError

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ops.mlp(*args)
        monkeypatch.setattr(ops.mlp._path, "forward", fails)
        with pytest.raises(MemoryError):
            ops.mlp(*args)
        assert torch.is_autocast_enabled("cpu")


def test_gradients_are_those_of_the_moment():
    args = projector()
    assert not ops.mlp(*args).requires_grad
    args[1] = nn.Parameter(args[1])
    assert ops.mlp(*args).requires_grad
    with torch.no_grad():
        assert not ops.mlp(*args).requires_grad
    args[1].requires_grad_(False)
    assert not ops.mlp(*args).requires_grad


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_are_seen_by_known_calls(transform):
    args = projector()
    ops.mlp(*args)
    call = lambda x: ops.mlp(x, *args[1:])  # noqa: E731
    if transform == "vmap":
        torch.testing.assert_close(torch.vmap(call)(args[0][:, None])[:, 0], call(args[0]))
    elif transform == "grad":
        assert torch.func.grad(lambda x: call(x).sum())(args[0]).shape == args[0].shape
    else:
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jvp(call, (args[0],), (args[0],))


def test_number_of_known_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(prepared_call, "MOST", 4)
    known = ops.mlp.prepared()
    for rows in range(1, 20):
        args = tuple(projector(rows))
        known(*args)
        assert known._answers[host.describe(args)] is not None
        assert len(known._answers) <= 4


def test_number_of_prepared_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(op_call, "MOST", 4)
    monkeypatch.setattr(ops.add_layer_norm, "_prepared", {})
    args, options = ops.add_layer_norm.sample(ops.add_layer_norm.usual_shape)
    for i in range(20):
        ops.add_layer_norm(*args, **{**options, "eps": 1e-5 + i * 1e-6})
        assert len(ops.add_layer_norm._prepared) <= 4


@any_op
def test_prepared_call_is_the_call(op):
    args, options = op.sample(op.usual_shape)
    prepared = op.prepared(**options)
    wanted = op(*args, **options)
    for _ in range(2):
        torch.testing.assert_close(prepared(*args), wanted, rtol=0, atol=0, equal_nan=True)


def test_description_holds_what_checks_read():
    x = torch.randn(4, 6)
    same = host.describe((x, None, [x, x]))
    assert same == host.describe((torch.zeros(4, 6), None, [x, x]))
    for other in (x.t(), x[:, ::2], x.half(), x[None], x.requires_grad_(), nn.Parameter(x)):
        assert host.describe((other, None, [x, x])) != same
    assert host.describe((x, None, (x, x))) != host.describe((x, None, [x, x]))
    assert host.describe((x, 3)) is None and host.describe((x.to("meta"),)) is None


def test_too_many_tensors_are_not_described():
    nested = torch.zeros(2)
    for _ in range(3900):
        nested = [nested]
    assert host.describe((nested,)) is None
    assert host.describe(tuple([torch.zeros(2, 3)] * 1000)) is None
    assert host.describe((torch.zeros(*[1] * 7),)) is None
