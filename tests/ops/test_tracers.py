"""torch.jit.trace, torch.fx and torch.jit.script of ops, modules and models."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import vlm_fast
from tests.support import tiny_llava, tiny_qformers
from tests.support.cases import any_op, each
from tests.support.small_connectors import SMALL
from tests.support.tiny_models import build
from vlm_fast import modules, ops
from vlm_fast.ops.anyres_tiling import Tiling

pytestmark = [
    pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def assert_close(ours, theirs):
    for one, other in zip(each(ours), each(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def flat_call(op, args, options):
    """The op as a function of flat tensors, and these tensors."""
    flat = [t for a in args for t in (a if isinstance(a, list) else [a]) if t is not None]

    def call(*tensors):
        given = iter(tensors)
        nested = [
            [next(given) for _ in a] if isinstance(a, list) else a if a is None else next(given)
            for a in args
        ]
        return op(*nested, **options)

    return call, tuple(flat)


@any_op
def test_traced_op_uses_the_reference(op):
    call, tensors = flat_call(op, *op.sample(op.usual_shape))
    traced = torch.jit.trace(call, tensors, check_trace=False)
    assert "vlm_fast::" not in str(traced.graph)
    other = flat_call(op, *op.sample(op.usual_shape))[1]  # inputs of the same sizes
    assert_close(traced(*other), call(*other))


PLAN = Tiling([(4, 4), (4, 8), (8, 4)], tile=4, side=2)
TOKENS = torch.arange(2 * 16 * 6).view(2, 16, 6).sin()
# Each module and its inputs.
MODULES = {
    "MLPProjector": lambda: (modules.MLPProjector(6, 8, 4), TOKENS),
    "SequentialProjector": lambda: (modules.SequentialProjector(6, 8, 4, depth=3), TOKENS),
    "PatchMerger": lambda: (modules.PatchMerger(6, 4), TOKENS[0]),
    "PatchMerger of windows": lambda: (
        modules.PatchMerger(6, 4, norm="rms", keys="qwen2"), TOKENS[0], torch.tensor([2, 0, 3, 1])
    ),
    "PixelShuffleProjector": lambda: (modules.PixelShuffleProjector(6, 4), TOKENS),
    "PixelShuffleConnector": lambda: (modules.PixelShuffleConnector(6, 4), TOKENS),
    "PixelShuffleMLP": lambda: (modules.PixelShuffleMLP(6, 4), TOKENS),
    "RaggedMergerProjector": lambda: (
        modules.RaggedMergerProjector(6, 4), TOKENS[0], [(2, 4), (2, 4)]
    ),
    "PooledMLPProjector": lambda: (modules.PooledMLPProjector(6, 4), TOKENS),
    "PooledNormProjector": lambda: (modules.PooledNormProjector(6, 4), TOKENS),
    "SpatialPool": lambda: (modules.SpatialPool(), TOKENS),
    "TokenBudget": lambda: (modules.TokenBudget(4), TOKENS),
    "TokenMerger": lambda: (modules.TokenMerger(2.5), TOKENS),
    "PerceiverAttention": lambda: (
        modules.PerceiverAttention(dim=6, dim_head=4, heads=2), TOKENS[:, None], TOKENS[:, None, :3]
    ),
    "PerceiverResampler": lambda: (
        modules.PerceiverResampler(dim=6, depth=2, dim_head=4, heads=2, num_latents=3),
        TOKENS[:, None, None],
    ),
    "GatedCrossAttentionBlock": lambda: (
        modules.GatedCrossAttentionBlock(dim=6, dim_visual=6, dim_head=4, heads=2),
        TOKENS[:, :5], TOKENS.view(2, 2, 8, 6),
    ),
    "QFormer": lambda: (
        modules.QFormer(**SMALL).eval(), torch.ones(2, 5, 48), None, None, torch.ones(2, 17, 40)
    ),
    "AnyResPacker": lambda: (
        modules.AnyResPacker(6, PLAN), TOKENS.view(8, 4, 6)[:5],
        modules.AnyResPacker(6, PLAN).plan([(4, 4), (3, 8)]),
    ),
}  # fmt: skip
SERVED = ("MLPProjector", "SequentialProjector")  # torch.fx can trace this module: it reads no size

every_module = pytest.mark.parametrize("name", MODULES)


def made(name):
    module, *given = MODULES[name]()
    with torch.no_grad():
        for parameter in module.parameters():  # nonzero gates and norm weights
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module, given


class OfTensors(nn.Module):
    """A wrapper with fixed keyword inputs that returns a tensor."""

    def __init__(self, module, given):
        super().__init__()
        self.module, self.given = module, given

    def forward(self, *tensors):
        tensors = iter(tensors)
        given = [next(tensors) if isinstance(g, Tensor) else g for g in self.given]
        result = self.module(*given)
        return getattr(result, "last_hidden_state", result)


def of_tensors(module, given):
    tensors = tuple(g for g in given if isinstance(g, Tensor))
    return OfTensors(module, given), tensors


@every_module
def test_traced_module_matches_eager(name):
    module, tensors = of_tensors(*made(name))
    traced = torch.jit.trace(module, tensors, check_trace=False)
    assert "vlm_fast::" not in str(traced.inlined_graph)
    other = tuple(t.roll(1) for t in tensors)
    assert_close(traced(*other), module(*other))


def logits_of(model, inputs):
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    others = {name: inputs[name] for name in inputs if name not in tensors | {"labels": None}}

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *given):
            named = dict(zip(tensors, given, strict=True))
            return self.model(**named, **others, use_cache=False).logits

    return Logits(), tuple(tensors.values())


TRACED = ("llava_next", "llava_onevision", "internvl", "qwen2_vl", "qwen3_vl", "mistral3")
MODELS = {
    "llava": lambda: (tiny_llava.llava(), tiny_llava.prompt()),
    "blip2": lambda: tiny_qformers.whole("Blip2ForConditionalGeneration"),
    **{name: lambda name=name: build(name) for name in TRACED},
}


@pytest.mark.parametrize("name", MODELS)
def test_traced_model_matches_unpatched(name):
    model, inputs = MODELS[name]()
    model.eval()
    logits, tensors = logits_of(model, inputs)
    with torch.no_grad():
        plain = logits(*tensors)
        assert vlm_fast.patch(model).patched
        traced = torch.jit.trace(logits, tensors, check_trace=False)
        assert "vlm_fast::" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(*tensors), plain, rtol=1e-4, atol=2e-6)


def test_traced_attention_uses_operators_known_to_onnx():
    """torch.onnx.export(dynamo=False) can write the operators of plain softmax."""
    op = ops.cross_attention
    for shape in op.test_shapes[:4]:
        call, tensors = flat_call(op, *op.sample(shape))
        traced = torch.jit.trace(call, tensors, check_trace=False)
        assert "_safe_softmax" not in str(traced.graph)
        assert_close(traced(*tensors), call(*tensors))  # also if a query attends to no key


# ---- torch.fx ----


@any_op
def test_symbolic_trace_calls_the_op(op):
    call, tensors = flat_call(op, *op.sample(op.usual_shape))
    tracer = torch.fx.Tracer()
    names = [f"t{i}" for i in range(len(tensors))]
    root = eval(f"lambda {', '.join(names)}: call({', '.join(names)})", {"call": call})
    module = torch.fx.GraphModule({}, tracer.trace(root))
    module.graph.eliminate_dead_code()  # sizes that the op has seen before
    assert [node.target for node in module.graph.nodes if node.op == "call_function"] == [op]
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_close(one(*tensors), call(*tensors))


def test_symbolic_trace_under_autocast_and_with_keywords():
    weight = torch.randn(6, 6)

    def two(x):
        y = ops.mlp(x, weight, None, weight_2=weight, bias_2=None, activation="silu")
        tokens, sizes = ops.merge_tokens(y, ops.bipartite_match(y, r=2))
        return tokens * sizes.unsqueeze(-1)

    with torch.autocast("cpu", torch.bfloat16):
        module = torch.fx.symbolic_trace(two)
    assert_close(module(TOKENS), two(TOKENS))


class Tower(nn.Module):
    """A model that contains a module."""

    def __init__(self, connector):
        super().__init__()
        self.first, self.connector = nn.Linear(6, 6), connector

    def forward(self, x):
        return self.connector(self.first(x))


@every_module
def test_symbolic_trace_of_a_module(name):
    module, given = made(name)
    if name in SERVED:
        for root in (module, Tower(module)):
            assert_close(torch.fx.symbolic_trace(root)(*given), root(*given))
        return
    owner = type(module).__name__
    with pytest.raises(TypeError, match=rf"vlm_fast\.{owner}: .* Proxy .*is_leaf_module"):
        torch.fx.symbolic_trace(module)


@pytest.mark.parametrize("name", ["PatchMerger", "TokenMerger", "PooledMLPProjector"])
def test_symbolic_trace_with_module_as_leaf(name):
    module, (x,) = made(name)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, found, where):
            return found is module or super().is_leaf_module(found, where)

    whole = Tower(module)
    traced = torch.fx.GraphModule(whole, Tracer().trace(whole))
    assert_close(traced(x), whole(x))


# ---- torch.jit.script ----


def projected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.mlp(x, weight, bias, weight, None, activation="silu")


def merged(x: Tensor) -> tuple[Tensor, Tensor]:
    destination, order, start = ops.bipartite_match(x, r=3, protected=1)
    return ops.merge_tokens(x, [destination, order, start])


def attended(x: Tensor) -> Tensor:
    heads = x.unsqueeze(1)
    return ops.cross_attention(heads, heads, heads, scale=0.3)


def of_all(function):
    weight, bias = torch.randn(6, 6), torch.randn(6)
    return (TOKENS, weight, bias) if function is projected else (TOKENS,)


@pytest.mark.parametrize("function", [projected, merged, attended])
def test_scripted_function_calls_the_op(function):
    scripted, given = torch.jit.script(function), of_all(function)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    for one in (scripted, torch.jit.load(file)):
        for _ in range(3):  # the first calls of a scripted function are profiled
            assert_close(one(*given), function(*given))
    x = TOKENS.clone().requires_grad_()
    gradients = [
        torch.autograd.grad(each(f(x, *given[1:]))[0].square().sum(), x)
        for f in (scripted, function)
    ]
    assert torch.equal(*(g for (g,) in gradients))


@every_module
def test_scripting_a_module_raises_with_reason(name):
    module, _ = made(name)
    for root in (module, Tower(module)):
        with pytest.raises(RuntimeError, match=rf"vlm_fast\.{type(module).__name__}: torch\.jit"):
            torch.jit.script(root)
