"""Patched nn.Sequential with replaced code, compiled, exported, traced and sharded."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import vlm_fast
from tests.support.chain_structures import HIDDEN, WIDTH, SimpleResBlock, TimmMlp, mlp
from tests.support.distributed_helpers import on_ranks
from tests.support.randomised_modules import gradients, randomised
from tests.support.sequential_pairs import X, every_pair, module_pair, pair
from tests.support.sharding_strategies import full_tensor_of

# The first call of a (module, reason) warns; every one is counted.
pytestmark = pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")


# ---- replaced code ----


def test_custom_forward_or_iter_is_not_patched():
    class Twice(nn.Sequential):
        def __iter__(self):
            return iter([*super().__iter__()] * 2)

    module = Twice(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="its forward is not a chain of its children"):
        vlm_fast.patch(module)
    module = mlp(2)
    module.forward = lambda x: x
    with pytest.warns(UserWarning, match="its forward has been replaced"):
        vlm_fast.patch(module)


# ---- compiled, exported, traced ----


@every_pair
@pytest.mark.parametrize("depth", [2, 3])
def test_compiles_to_one_graph(make, depth):
    plain, fast = make(depth)
    expected = gradients(plain, X)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with vlm_fast.strict():
        for one, other in zip(gradients(compiled, X), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm Mlp", "functional", "QuickGELU", "VILA mlp_downsample"])
def test_other_structures_compile_to_one_graph(name):
    from tests.support.chain_structures import STRUCTURES

    make, shape, *_ = STRUCTURES[name]
    module, x = randomised(make()), torch.randn(shape)
    expected = gradients(module, x)
    vlm_fast.patch(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_compiles_with_a_wrapped_child():
    plain, fast = (TimmMlp(0.5).train() for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    vlm_fast.patch(fast)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert compiled(X).shape == plain(X).shape
    for module in (plain, fast):
        module.eval()
    torch.testing.assert_close(compiled(X), plain(X))


def test_exported_as_plain_pytorch():
    plain, fast = pair(3)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fast, (X,), dynamic_shapes=({0: batch},))
    assert not any("vlm_fast" in str(node.target) for node in program.graph.nodes)
    assert program.state_dict.keys() == plain.state_dict().keys()
    x = torch.randn(7, 5, WIDTH)
    torch.testing.assert_close(program.module()(x), plain(x))


def test_traced_as_plain_pytorch():
    plain, fast = pair(3)
    for module in (fast, nn.Sequential(fast, nn.Tanh())):
        expected = plain(X) if module is fast else plain(X).tanh()
        assert torch.equal(torch.fx.symbolic_trace(module)(X), expected)
        assert torch.equal(torch.jit.script(module)(X), expected)
        traced = torch.jit.trace(module, (X,), check_trace=False)
        assert "vlm_fast::" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(X), expected)
    with vlm_fast.strict():
        torch.testing.assert_close(fast(X), plain(X))


# ---- sharded ----


def test_patched_sequential_is_listed_by_connectors():
    model = nn.ModuleDict({"mm_projector": mlp(2), "other": mlp(1)})
    model["res"] = nn.Sequential(*mlp(2), SimpleResBlock(HIDDEN))
    vlm_fast.patch(model)
    names = [name for name, _ in vlm_fast.connectors(model)]
    assert names == ["mm_projector", "res"]


def fsdp2_unit_matches_one_process(rank, world, make, inside):
    """The whole model, or a unit ``inside`` it: gradients match one process."""
    torch.manual_seed(0)
    single, sharded = make(3)
    if inside:
        single, sharded = (nn.Sequential(m, nn.LayerNorm(HIDDEN)) for m in (single, sharded))
        fully_shard(sharded[0])
    fully_shard(sharded)
    vlm_fast.stats(reset=True)
    ours = sharded(X[rank : rank + 1])
    counts = vlm_fast.stats(reset=True)
    assert counts["act_linear"]["fast"] == 1 and not any(c["fallback"] for c in counts.values())
    ours.square().sum().backward()
    theirs = single(X)
    theirs.square().sum().div(world).backward()
    torch.testing.assert_close(ours, theirs[rank : rank + 1], rtol=1e-4, atol=1e-5)
    for one, other in zip(sharded.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(full_tensor_of(one.grad), other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.multiprocess
def test_on_two_ranks(tmp_path):
    on_ranks(
        tmp_path,
        [
            (fsdp2_unit_matches_one_process, make, inside)
            for make in (pair, module_pair)
            for inside in (0, 1)
        ],
    )
