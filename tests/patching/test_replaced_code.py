"""User code that replaces a forward or a child of a patched class runs.

There is a small model for each patched class. Each change is made to a plain and a patched model,
and both must give the same results.
"""

import copy
import functools
import types

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import vlm_fast
from tests.support import reference_flamingo, tiny_flamingos, tiny_models, tiny_qformers
from tests.support.chain_structures import TimmMlp, mlp
from tests.support.randomised_modules import randomised
from tests.support.selection import REPRESENTATIVES, slow_except
from tests.support.small_connectors import SMALL, open_gates
from vlm_fast import modules
from vlm_fast.patching import patched_modules

GATED = dict(dim=24, dim_visual=12, dim_head=8, heads=2)
RESAMPLER = dict(dim=24, depth=2, dim_head=8, heads=2, num_latents=4)


def tiny(name):
    model, inputs = tiny_models.build(name)
    return model.eval(), inputs


def qformer():
    return tiny_qformers.blip2(**tiny_qformers.SMALL), dict(
        query_embeds=torch.randn(2, 5, 48), encoder_hidden_states=torch.randn(2, 7, 40),
        encoder_attention_mask=tiny_qformers.ones_but(2, 7, (1, 4)),
    )  # fmt: skip


def qformer_with_text():
    return tiny_qformers.instructblip(**tiny_qformers.SMALL), dict(
        input_ids=torch.randint(3, 90, (2, 4)), query_embeds=torch.randn(2, 5, 48),
        attention_mask=tiny_qformers.ones_but(2, 9, (0, 2)),
        encoder_hidden_states=torch.randn(2, 7, 40),
    )  # fmt: skip


def flamingo():
    torch.manual_seed(0)
    block = open_gates(reference_flamingo.GatedCrossAttentionBlock(**GATED))
    locations = torch.tensor([[1, 0, 0, 1, 0]]).bool()
    given = dict(x=torch.randn(1, 5, 24), media=torch.randn(1, 2, 3, 12), media_locations=locations)
    return block.eval(), given


def resampler():
    torch.manual_seed(0)
    return reference_flamingo.PerceiverResampler(**RESAMPLER).eval(), dict(
        x=torch.randn(1, 2, 1, 7, 24)
    )


MODELS = {
    **{name: functools.partial(tiny, name) for name in REPRESENTATIVES},
    "blip2": qformer,
    "instructblip": qformer_with_text,
    "idefics": lambda: (tiny_flamingos.idefics(), tiny_flamingos.idefics_inputs()),
    "mllama": lambda: (tiny_flamingos.mllama(), tiny_flamingos.mllama_inputs()),
    "LLaVA's own projector": lambda: (
        randomised(nn.Sequential(nn.LayerNorm(16), *mlp(3))), dict(input=torch.randn(2, 5, 16))
    ),
    "timm's MLP": lambda: (randomised(TimmMlp()), dict(x=torch.randn(2, 5, 16))),
    "flamingo block": flamingo,
    "flamingo resampler": resampler,
}  # fmt: skip


@functools.cache
def built(name):
    model, inputs = MODELS[name]()
    return model.eval(), inputs


@functools.cache
def places(name):
    """One patched module of each class in this model, and one child of each kind.

    Children of a model that is patched for its merge are excluded, since they are the whole model.
    """
    model, _ = built(name)
    fast = copy.deepcopy(model)
    vlm_fast.patch(fast)
    roots, children, kinds = [], [], set()
    for path, module in patched_modules(fast):
        base = type(module).patch_spec.base
        if base in kinds:
            continue
        kinds.add(base)
        roots.append(path)
        if module.why_not() is None and sum(1 for _ in module.modules()) < 60:
            seen = set()
            for inner, child in module.named_modules():
                ending = inner.rpartition(".")[2]
                if (
                    inner
                    and (type(child), ending) not in seen
                    and not is_container_or_rotary(child)
                ):
                    seen.add((type(child), ending))
                    children.append(f"{path}.{inner}".lstrip("."))
    return roots, children


def is_container_or_rotary(module):
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) or type(module).__name__.endswith(
        "RotaryEmbedding"
    )


def scaled(value):
    """The result with every floating tensor scaled."""
    return tree_map(lambda v: v * 1.5 if is_float(v) else v, value)


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def scaling(forward):
    @functools.wraps(forward)
    def mine(self, *args, **kwargs):
        return scaled(forward(self, *args, **kwargs))

    return mine


def answers(model, inputs):
    with torch.no_grad():
        found = model(**inputs)
    return [t for t in tree_leaves(found) if is_float(t)]


def assert_alike(fast, plain, inputs):
    """Compare both results and return the plain one."""
    ours, theirs = answers(fast, inputs), answers(plain, inputs)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        scale = other.abs().max().item() if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(scale, 1e-3))
    return theirs


def every(which):
    return [
        pytest.param(name, path, id=f"{name}: {path or '(the model)'}")
        for name in MODELS
        for path in places(name)[which]
    ]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", MODELS)
def test_forward_replaced_in_its_class_runs(name, when, monkeypatch):
    """For each patched class and each class inside one."""
    model, inputs = built(name)
    before = answers(model, inputs)
    roots, children = places(name)
    kinds = {type(model.get_submodule(path)) for path in (*roots, *children)}
    for kind in sorted(kinds, key=lambda k: k.__name__):
        fast = copy.deepcopy(model)
        with monkeypatch.context() as patch:
            if when == "after":
                vlm_fast.patch(fast)
                answers(fast, inputs)
            patch.setattr(kind, "forward", scaling(kind.forward))
            if when == "before":
                vlm_fast.patch(fast)
            now = assert_alike(fast, model, inputs)
            # torch's attention reads the parameters of this linear and never calls it.
            if kind is not nn.modules.linear.NonDynamicallyQuantizableLinear:
                assert not all(map(torch.equal, now, before)), kind


def subclass(module):
    kind = type(module)
    module.__class__ = type("Mine", (kind,), {"forward": scaling(kind.forward)})


def adapt(module):
    """Replace the class of a module, as adapter libraries do."""
    kind = type(module)

    class Adapted(kind):
        def __call__(self, *args, **kwargs):
            return scaled(super().__call__(*args, **kwargs))

    module.__class__ = Adapted


def own_forward(module):
    forward = module.forward
    module.forward = types.MethodType(lambda self, *a, **k: scaled(forward(*a, **k)), module)


def hook(module):
    module.register_forward_hook(lambda module, args, result: scaled(result))


def pre_hook(module):
    module.register_forward_pre_hook(
        lambda module, args, kwargs: (scaled(args), scaled(kwargs)), with_kwargs=True
    )


CHANGES = [subclass, adapt, own_forward, hook, pre_hook]
every_change = pytest.mark.parametrize("change", slow_except([subclass, hook], CHANGES))


@every_change
@pytest.mark.parametrize("name", MODELS)
def test_changed_child_runs(name, change):
    model, inputs = built(name)
    for path in places(name)[1]:
        plain, fast = copy.deepcopy(model), copy.deepcopy(model)
        vlm_fast.patch(fast)
        answers(fast, inputs)
        for m in (plain, fast):
            change(m.get_submodule(path))
        assert_alike(fast, plain, inputs)


@pytest.mark.parametrize("change", slow_except([pre_hook], [own_forward, hook, pre_hook]))
@pytest.mark.parametrize("name", MODELS)
def test_changed_connector_runs(name, change):
    """Hooks on a patched module see the arguments of its class and can change them."""
    model, inputs = built(name)
    for path in places(name)[0]:
        plain, fast = copy.deepcopy(model), copy.deepcopy(model)
        vlm_fast.patch(fast)
        for m in (plain, fast):
            change(m.get_submodule(path))
        assert_alike(fast, plain, inputs)


@pytest.mark.parametrize("name", ["llava", "blip2", "flamingo block"])
def test_call_replaced_in_a_torch_class_runs(name, monkeypatch):
    model, inputs = built(name)
    fast = copy.deepcopy(model)
    vlm_fast.patch(fast)
    answers(fast, inputs)
    for kind in (nn.LayerNorm, nn.Linear):
        with monkeypatch.context() as patch:
            patch.setattr(kind, "__call__", scaling(kind.__call__))
            assert_alike(fast, model, inputs)


def own_qformer():
    return modules.QFormer(**SMALL), *qformer()


def own_block():
    return modules.GatedCrossAttentionBlock(**GATED), *flamingo()


def own_resampler():
    return modules.PerceiverResampler(**RESAMPLER), *resampler()


OWN = {"QFormer": own_qformer, "block": own_block, "resampler": own_resampler}


@functools.cache
def own(name):
    module, plain, inputs = OWN[name]()
    module.load_state_dict(plain.state_dict())
    return module.eval(), plain.eval(), inputs


def callable_children(module):
    """Children whose forward runs: leaves, and modules of the package with a forward."""
    return [
        path
        for path, child in module.named_modules()
        if path and type(child).forward is not nn.Module.forward
    ]


@every_change
@pytest.mark.parametrize("name", OWN)
def test_changed_child_of_vlm_fast_modules_runs(name, change):
    module, plain, inputs = own(name)
    for path in callable_children(module):
        if change is pre_hook and path.startswith("encoder") and path.count(".") < 3:
            continue  # an encoder and layers with other arguments
        ours, theirs = copy.deepcopy(module), copy.deepcopy(plain)
        answers(ours, inputs)
        for m in (ours, theirs):
            change(m.get_submodule(path))
        assert_alike(ours, theirs, inputs)


@pytest.mark.parametrize("name", OWN)
def test_forward_replaced_in_a_torch_class_runs(name, monkeypatch):
    module, plain, inputs = own(name)
    answers(module, inputs)
    for kind in (nn.LayerNorm, nn.Linear, nn.Dropout):
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", scaling(kind.forward))
            assert_alike(module, plain, inputs)


def test_changed_modules_that_are_never_called_raise():
    """Containers without a forward, and modules whose forward the package replaces."""
    qformer = copy.deepcopy(own("QFormer")[0])
    inputs = own("QFormer")[2]
    adapt(qformer.encoder.layer[0].output_query)
    with pytest.raises(ValueError, match=r"output_query: .* is not a class whose code was read"):
        qformer(**inputs)
    model = copy.deepcopy(own("QFormer")[1])
    shared = modules.QFormer.from_module(model)
    for path in ("encoder", "encoder.layer.1", "encoder.layer.1.attention.output"):
        handle = model.get_submodule(path).register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="it has hooks"):
            shared(**inputs)
        handle.remove()
    shared(**inputs)
    model.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="it has hooks"):
        modules.QFormer.from_module(model)
