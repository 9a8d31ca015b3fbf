"""Lifetime of a patch: garbage collection, copies, and revert of parametrized modules."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import vlm_fast
from tests.support import tiny_flamingos, tiny_llava, tiny_models, tiny_qformers
from tests.support.selection import slow_except
from tests.support.small_connectors import SMALL
from vlm_fast.modules import GatedCrossAttentionBlock, PerceiverResampler, QFormer
from vlm_fast.patching import class_swap, patched_modules


def patched(model, given):
    vlm_fast.patch(model)
    return model, given


def qformer():
    return QFormer(**SMALL).eval(), dict(
        query_embeds=torch.randn(2, 5, 48), encoder_hidden_states=torch.randn(2, 7, 40)
    )


MODELS = {
    "QFormer": qformer,
    "block": lambda: (
        GatedCrossAttentionBlock(dim=24, dim_visual=12).eval(),
        dict(x=torch.randn(1, 3, 24), media=torch.randn(1, 1, 2, 12)),
    ),
    "resampler": lambda: (
        PerceiverResampler(dim=24, num_latents=4, depth=1).eval(),
        dict(x=torch.randn(1, 1, 1, 5, 24)),
    ),
    "patched IDEFICS": lambda: patched(tiny_flamingos.idefics(), tiny_flamingos.idefics_inputs()),
    "patched Llama 3.2": lambda: patched(tiny_flamingos.mllama(), tiny_flamingos.mllama_inputs()),
    "patched Aria": lambda: patched(*tiny_models.build("aria")),
    "patched Q-Former": lambda: patched(tiny_qformers.blip2(**SMALL), qformer()[1]),
}


@pytest.mark.parametrize(
    "name", slow_except(["QFormer", "block", "patched Llama 3.2", "patched Aria"], MODELS)
)
@pytest.mark.parametrize("knows", ["hook", "child"])
def test_model_in_reference_cycle_is_collected(name, knows):
    """The cycle goes through a hook that holds the model or a child that holds its parent."""
    model, given = MODELS[name]()
    for module in list(model.modules())[1:]:
        if knows == "hook" and isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, a, y, model=model: None)
        elif knows == "child":
            object.__setattr__(module, "parent", [model])
    with torch.no_grad():
        for _ in range(2):
            model(**given)
    watched = [weakref.ref(module) for module in model.modules()]
    del model, module
    gc.collect()
    assert not any(module() is not None for module in watched)


@pytest.mark.parametrize("name", MODELS)
def test_cached_module_state_is_not_copied_or_saved(name):
    model, given = MODELS[name]()
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = vlm_fast.explain(model)
        model(**given)
    assert any("_direct_tree" in vars(module) for module in model.modules())
    copied = copy.deepcopy(model)
    assert list(copied.state_dict()) == keys
    assert not any(vars(module).get("_direct_tree") for module in copied.modules())
    assert vlm_fast.explain(copied) == expected
    file = io.BytesIO()
    torch.save(next(module for module in model.modules() if "_direct_tree" in vars(module)), file)
    file.seek(0)
    assert not vars(torch.load(file, weights_only=False))["_direct_tree"]
    vlm_fast.unpatch(model)
    if name.startswith("patched"):
        assert not any("_direct_tree" in vars(module) for module in model.modules())


def test_unused_classes_are_collected():
    def once():
        class Projector(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear_1, self.act, self.linear_2 = nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)

            def forward(self, x):
                return self.linear_2(self.act(self.linear_1(x)))

        model = Projector()
        vlm_fast.patch(model)
        assert type(model) is not Projector and type(copy.deepcopy(model)) is type(model)
        return weakref.ref(Projector), weakref.ref(type(model))

    classes = [c for _ in range(3) for c in once()]
    for _ in range(2):  # the patched class is freed first, then its base
        gc.collect()
    assert not any(c() is not None for c in classes)
    assert all(patch.base.__name__ != "Projector" for patch in class_swap._swapped_classes)


def doubled(module):
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    parametrize.register_parametrization(module, module_parameter(module), Doubled())


def module_parameter(module):
    return next(name for name, _ in module.named_parameters(recurse=False))


@pytest.mark.parametrize("name", ["gemma3", "aria"])
def test_revert_with_parametrization_raises(name):
    """A parametrization set after the patch must be removed before the patch is reverted."""
    model, inputs = tiny_models.build(name)
    plain = copy.deepcopy(model)
    report = vlm_fast.patch(model)
    module = next(
        m for _, m in patched_modules(model) if any(True for _ in m.parameters(recurse=False))
    )
    path = next(n for n, m in model.named_modules() if m is module)
    doubled(module)
    doubled(plain.get_submodule(path))
    with torch.no_grad():
        expected = plain(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        kinds = [type(m) for m in model.modules()]
        for undo in (report.revert, lambda: vlm_fast.unpatch(model)):
            with pytest.raises(ValueError, match="stays patched: its class has become Parametri"):
                undo()
        with pytest.raises(ValueError, match="stays patched"):
            vlm_fast.verify(model, **inputs)
        assert kinds == [type(m) for m in model.modules()]
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    parametrize.remove_parametrizations(module, next(iter(module.parametrizations)))
    report.revert()
    assert not list(patched_modules(model))


def test_parametrized_child_is_called():
    model, inputs = tiny_models.build("llava")
    vlm_fast.patch(model)
    plain = copy.deepcopy(model)
    vlm_fast.unpatch(plain)
    for m in (model, plain):
        torch.manual_seed(1)
        parametrizations.weight_norm(m.model.multi_modal_projector.linear_1)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)
    vlm_fast.unpatch(model)


def test_symbolic_trace_and_script_see_the_original_code():
    projector = tiny_llava.llava().model.multi_modal_projector.eval()
    plain = copy.deepcopy(projector)
    vlm_fast.patch(projector)
    x = torch.randn(2, 3, projector.linear_1.in_features)
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(torch.fx.symbolic_trace(projector)(x), expected)
        assert torch.equal(torch.jit.script(projector)(x), expected)
        inside = nn.Sequential(projector, nn.Tanh())
        assert torch.equal(torch.fx.symbolic_trace(inside)(x), expected.tanh())
        assert torch.equal(torch.jit.script(inside)(x), expected.tanh())
        with vlm_fast.strict():
            torch.testing.assert_close(projector(x), expected)
