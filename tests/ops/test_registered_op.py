"""Registered ops: torch.compile, export, meta and fake tensors, dispatch modes, DTensor."""

import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from tests.support.cases import (
    DIFFERENTIABLE,
    OPS,
    OWN,
    any_case,
    any_op,
    each,
    every_case,
    every_op,
    two_shapes,
)
from tests.support.dispatch_modes import RecordingMode
from vlm_fast.ops.declaration import with_batch
from vlm_fast.verification import tolerance

# All but AOTAutograd with static shapes, which test_compiled_is_bitwise_eager covers.
OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


def registered_call(op, shape):
    """The path of an op, and positional and keyword arguments of its registered forward."""
    args, options = op.sample(shape)
    args = tolerance.convert(args, lambda t: t.detach().requires_grad_())
    settings = {**op.defaults, **options}
    values = op.accepted(args, settings)
    needs = [v is not None and v.requires_grad for v in op._path.flatten(values)]
    return op._path, values, {**settings, "needs_grad": needs}


@pytest.mark.parametrize("check", OPCHECKS)
@any_op
def test_opcheck_of_forward(op, check):
    path, values, keywords = registered_call(op, op.usual_shape)
    opcheck(path.registered, values, keywords, test_utils=check)


@pytest.mark.parametrize("check", OPCHECKS)
@every_op
def test_opcheck_of_backward(op, check):
    path, values, keywords = registered_call(op, op.usual_shape)
    needs = keywords.pop("needs_grad")
    with torch.no_grad():
        result, kept = path.forward(
            path.needs_of(tuple(needs), path.count(values)), *values, **keywords
        )
    grads = [
        tolerance.random_upstream(r) for r in (result if isinstance(result, tuple) else [result])
    ]
    keywords |= {"list_length": path.count(values), "needs_grad": needs}
    backward = getattr(torch.ops.vlm_fast, f"{op.name}_backward").default
    kept = [t if t is None else t.detach() for t in kept]
    opcheck(backward, (grads, kept), keywords, test_utils=check)


def holds_op(graph_module, op):
    return any(node.target is op._path.registered for node in graph_module.graph.nodes)


def assert_same(ours, theirs):
    for one, other in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        if one is None or other is None:  # the gradient of an input that only selects
            assert one is other
        else:
            assert one.dtype == other.dtype and torch.equal(one, other)


@two_shapes
@any_op
def test_compiled_is_bitwise_eager(op, number):
    args, options = op.sample(op.test_shapes[number])
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *a: op(*a, **options), fullgraph=True, backend=graphs)
    assert_same(
        tolerance.outputs_and_gradients(compiled, args, {}),
        tolerance.outputs_and_gradients(op.fast, args, options),
    )
    assert holds_op(graphs.graphs[0], op)


# One op of each kind of schema: optional tensors, a list of tensors, several results, indices.
KINDS = ("mlp", "cross_attention", "merge_image_tokens", "gated_add_norm", "bipartite_match")


def one_of_each_kind(ops):
    """Parametrises ``op``; those that repeat a kind of schema are slow."""
    marks = {name: [pytest.mark.slow] * (name not in KINDS) for name in ops}
    return pytest.mark.parametrize(
        "op", [pytest.param(op, id=name, marks=marks[name]) for name, op in ops.items()]
    )


@one_of_each_kind(OWN)
def test_compiled_by_inductor(op):
    args, options = op.sample(op.usual_shape)
    graphs = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda *a: 2 * op(*a, **options), fullgraph=True, backend=graphs)
    assert_same(
        tolerance.outputs_and_gradients(compiled, args, {}),
        tolerance.outputs_and_gradients(lambda *a: 2 * op.fast(*a, **options), args, {}),
    )
    assert holds_op(graphs.graphs[0], op)


@one_of_each_kind(DIFFERENTIABLE)
def test_compiled_under_autocast(op):
    args, options = op.sample(op.usual_shape)

    def call(*values):
        with torch.autocast("cpu", torch.bfloat16):
            return op(*values, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(
        tolerance.outputs_and_gradients(compiled, args, {}),
        tolerance.outputs_and_gradients(call, args, {}),
    )


@one_of_each_kind(OWN)
def test_new_sizes_recompile_at_most_once(op):
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, fullgraph=True, backend=graphs)
    for factor in (2, 3, 4, 5):
        args, options = op.sample(with_batch(op.usual_shape, 3 * factor))
        assert_same(
            tolerance.outputs_and_gradients(compiled, args, options),
            tolerance.outputs_and_gradients(op.fast, args, options),
        )
    assert graphs.frame_count <= 2


@any_op
def test_exported_program_contains_only_aten_ops(op):
    args, options = op.sample(op.usual_shape)

    class Model(torch.nn.Module):
        def forward(self, *args):
            return op(*args, **options)

    file = io.BytesIO()
    torch.export.save(torch.export.export(Model(), args), file)
    file.seek(0)
    program = torch.export.load(file)
    assert not any("vlm_fast" in str(node.target) for node in program.graph.nodes)
    found, expected = program.module()(*args), op.reference(*args, **options)
    for ours, theirs in zip(each(found), each(expected), strict=True):
        assert torch.equal(ours, theirs)


def metadata(tensors):
    return [t if t is None else (t.shape, t.dtype, t.stride()) for t in tensors]


@any_case
def test_meta_tensors_give_shapes_and_dtypes(op, shape):
    real_args, options = op.sample(shape)
    real = tolerance.outputs_and_gradients(op.fast, real_args, options)
    args, options = op.sample(shape, device="meta")
    meta = tolerance.outputs_and_gradients(op, args, options, upstream=torch.empty_like)
    assert all(t is None or t.is_meta for part in meta for t in part)
    assert [metadata(part) for part in meta] == [metadata(part) for part in real]


@any_case
def test_fake_tensors_give_shapes_and_dtypes(op, shape):
    args, options = op.sample(shape)
    real = tolerance.outputs_and_gradients(op.fast, args, options)
    with FakeTensorMode(allow_non_fake_inputs=False):
        args, options = op.sample(shape)
        fake = tolerance.outputs_and_gradients(op, args, options, upstream=torch.empty_like)
    assert [metadata(part) for part in fake] == [metadata(part) for part in real]


@every_case
def test_dispatch_modes_see_the_op(op, shape):
    args, options = op.sample(shape)
    with RecordingMode() as mode:
        watched = tolerance.outputs_and_gradients(op, args, options)
    assert_same(watched, tolerance.outputs_and_gradients(op.fast, args, options))
    backward = getattr(torch.ops.vlm_fast, f"{op.name}_backward").default
    assert {op._path.registered, backward} <= mode.seen


@pytest.fixture
def mesh():
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    destroy_process_group()


@pytest.mark.parametrize("all_arguments", [True, False], ids=["every argument", "the first"])
@any_op
def test_dtensors_are_refused(op, mesh, all_arguments):
    from torch.distributed.tensor import DTensor, Replicate

    args, options = op.sample(op.usual_shape)

    def distributed(value):
        if value is None:
            return None
        if isinstance(value, list):
            return [distributed(v) for v in value]
        return DTensor.from_local(value, mesh, [Replicate()], run_check=False)

    args = [distributed(a) if all_arguments or i == 0 else a for i, a in enumerate(args)]
    for call in (op, op.fast):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError, ValueError)) as error:
            call(*args, **options)
        assert op.name in str(error.value)


def test_all_ops_are_registered():
    assert {op._path.registered.namespace for op in OPS.values()} == {"vlm_fast"}


@pytest.mark.parametrize(
    "name, option, values",
    [
        ("cross_attention", "dropout", [0.1 + i / 100 for i in range(5)]),
        ("gated_add_norm", "eps", [10.0**-i for i in range(2, 7)]),
        ("cross_attention", "scale", [0.1 + i / 100 for i in range(5)]),
    ],
)
def test_changing_option_values_do_not_grow_caches(name, option, values):
    """Compiled code is cached per kind of call, not per option value."""
    op = OPS[name]
    shape = next(s for s in op.test_shapes if option != "dropout" or s.get("dropout"))
    args, options = op.sample(shape)
    counts = []
    for value in values:
        options[option] = value
        expected = tolerance.outputs_and_gradients(op.fast, args, options)
        with RecordingMode():
            assert_same(tolerance.outputs_and_gradients(op, args, options), expected)
        counts.append((len(op._path.saved_sources), len(op._path.backward_sources)))
    assert set(counts) == {counts[0]}


def test_dropout_may_alternate_with_zero():
    op = OPS["cross_attention"]
    args, options = op.sample(op.test_shapes[1])
    for dropout in (0.25, 0.0, 0.5, 0.0, 0.25):
        options["dropout"] = dropout
        with RecordingMode():
            found = tolerance.outputs_and_gradients(op, args, options)
        assert_same(found, tolerance.outputs_and_gradients(op.fast, args, options))
