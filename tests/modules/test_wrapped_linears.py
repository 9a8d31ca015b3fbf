"""Wrapped, hooked or replaced linears inside connectors are called instead of fused.

Every wrapper in every connector: the same change to a fast and a plain module gives the same
output and gradients, or the same error, and the fallback has a reason.
"""

import copy
import re
import types
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

import vlm_fast
from tests.support import reference_flamingo, tiny_flamingos, tiny_qformers
from tests.support.chain_structures import mlp
from tests.support.connectors_of_every_kind import assert_close
from tests.support.linear_wrappers import HOOKS, LINEAR_WRAPPERS
from tests.support.selection import slow_except
from tests.support.small_connectors import SMALL, open_gates
from tests.support.tiny_llava import llava
from vlm_fast.modules import (
    GatedCrossAttentionBlock,
    MLPProjector,
    PerceiverResampler,
    QFormer,
    SequentialProjector,
)

# The first call of a (module, reason) warns; every one is counted.
pytestmark = pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")

RESAMPLER = dict(dim=24, depth=2, dim_head=16, heads=2, num_latents=4)
GATED = dict(dim=24, dim_visual=12, dim_head=8, heads=2)


def projector():
    return llava().model.multi_modal_projector


def gated():
    return open_gates(reference_flamingo.GatedCrossAttentionBlock(**GATED))


def idefics_resampler():
    return tiny_flamingos.idefics().model.perceiver_resampler.train()


def idefics_layer():
    return tiny_flamingos.idefics().model.gated_cross_attn_layers[1].train()


def idefics_images():
    return dict(
        image_hidden_states=torch.randn(2, 12, 40), image_attention_mask=torch.zeros(2, 1, 7, 12),
        cross_attention_gate=torch.ones(2, 7),
    )  # fmt: skip


class Form(NamedTuple):
    """A connector and its unpatched original.

    Attributes:
        plain: builds transformers' or OpenFlamingo's module.
        module: builds ours with the same parameters; None: the plain module is patched.
        linear: the name of a linear inside.
        given: inputs, by position or by name.
    """

    plain: Callable[[], nn.Module]
    module: Callable[[], nn.Module] | None
    linear: str
    given: Callable[[], tuple[torch.Tensor, ...] | dict[str, torch.Tensor]]


def _qformer_inputs():
    return dict(query_embeds=torch.randn(2, 5, 48), encoder_hidden_states=torch.randn(2, 17, 40))


def _qformer():
    return tiny_qformers.blip2(**tiny_qformers.SMALL)


KEY, TO_Q = "encoder.layer.0.crossattention.attention.key", "layers.0.0.to_q"
FORMS = {
    "patched LLaVA projector": Form(
        projector, None, "linear_2", lambda: (torch.randn(3, 5, 48),)
    ),
    "MLPProjector": Form(
        projector, lambda: MLPProjector(48, 64), "linear_1", lambda: (torch.randn(3, 5, 48),)
    ),
    "patched nn.Sequential": Form(
        lambda: mlp(3, 48, 64), None, "2", lambda: (torch.randn(3, 5, 48),)
    ),
    "SequentialProjector": Form(
        lambda: mlp(3, 48, 64), lambda: SequentialProjector(48, 64, depth=3), "4",
        lambda: (torch.randn(3, 5, 48),)
    ),
    "patched BLIP-2 Q-Former": Form(_qformer, None, KEY, _qformer_inputs),
    "QFormer": Form(_qformer, lambda: QFormer(**SMALL).eval(), KEY, _qformer_inputs),
    "patched IDEFICS resampler": Form(
        idefics_resampler, None, "blocks.0.0.v_proj", lambda: (torch.randn(2, 17, 40),)
    ),
    "patched Flamingo resampler": Form(
        lambda: reference_flamingo.PerceiverResampler(**RESAMPLER), None, TO_Q,
        lambda: (torch.randn(2, 2, 1, 9, 24),),
    ),
    "PerceiverResampler": Form(
        lambda: reference_flamingo.PerceiverResampler(**RESAMPLER),
        lambda: PerceiverResampler(**RESAMPLER), TO_Q,
        lambda: (torch.randn(2, 2, 1, 9, 24),),
    ),
    "patched IDEFICS layer": Form(
        idefics_layer, None, "cross_attn.q_proj",
        lambda: dict(hidden_states=torch.randn(2, 7, 64), **idefics_images()),
    ),
    "patched Flamingo block": Form(
        gated, None, "ff.3",
        lambda: (torch.randn(2, 7, 24), torch.randn(2, 2, 3, 12)),
    ),
    "GatedCrossAttentionBlock": Form(
        gated, lambda: GatedCrossAttentionBlock(**GATED), "attn.to_kv",
        lambda: (torch.randn(2, 7, 24), torch.randn(2, 2, 3, 12)),
    ),
}  # fmt: skip
every_form = pytest.mark.parametrize("form", FORMS)


def pair(form):
    """The plain module and the fast one with the same parameters."""
    make = FORMS[form]
    torch.manual_seed(0)
    plain = make.plain()
    if make.module is None:
        fast = copy.deepcopy(plain)
        vlm_fast.patch(fast, strict=True)
    else:
        fast = make.module()
        fast.load_state_dict(plain.state_dict(), strict=True)
    return plain, fast


def changed(module, form, wrapping):
    """Apply the change with fixed random numbers."""
    parent, _, name = FORMS[form].linear.rpartition(".")
    torch.manual_seed(3)
    LINEAR_WRAPPERS[wrapping][0](module.get_submodule(parent), name)
    return module


def inputs(form):
    torch.manual_seed(1)
    return FORMS[form].given()


def call(module, given):
    output = module(**given) if isinstance(given, dict) else module(*given)
    output = output[0] if isinstance(output, tuple) else output
    return getattr(output, "last_hidden_state", output)


def outcome(module, form):
    """The output and every gradient, or the error that is raised."""
    given = inputs(form)
    leaves = list(given.values() if isinstance(given, dict) else given)
    for leaf in leaves:
        leaf.requires_grad_()
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    try:
        y = call(module, given)
        torch.manual_seed(7)
        sources = [*leaves, *named.values()]
        grads = torch.autograd.grad(y, sources, torch.randn_like(y), allow_unused=True)
    except Exception as error:
        return type(error)
    return dict(zip(["output", *range(len(leaves)), *named], [y.detach(), *grads], strict=True))


def assert_same(fast, plain, form):
    ours, theirs = outcome(fast, form), outcome(plain, form)
    if not isinstance(theirs, dict):
        assert ours is theirs
        return
    assert isinstance(ours, dict), ours
    assert_close(ours, theirs)


def assert_falls_back(fast, form, reason):
    """Check that the reason is known before a call, and also by `explain` if patched."""
    with vlm_fast.strict(), pytest.raises(vlm_fast.VlmFastFallbackError, match=reason):
        call(fast, inputs(form))
    explained = vlm_fast.explain(fast)
    assert bool(explained) == (FORMS[form].module is None)
    assert not explained or any(re.search(reason, why or "") for why in explained.values()), (
        explained
    )
    vlm_fast.stats(reset=True)


def counted():
    return [reason for counts in vlm_fast.stats().values() for reason in counts["fallback"]]


def assert_fused(fast, plain, form):
    with vlm_fast.strict():
        assert_same(fast, plain, form)
    assert sum(counts["fast"] for counts in vlm_fast.stats().values()) and not counted()


@every_form
def test_plain_linears_are_fused(form):
    plain, fast = pair(form)
    assert_fused(fast, plain, form)


@pytest.mark.parametrize("wrapping", slow_except(list(LINEAR_WRAPPERS)[::3], LINEAR_WRAPPERS))
@every_form
def test_wrapped_linears_are_called(form, wrapping):
    plain, fast = (changed(module, form, wrapping) for module in pair(form))
    assert_falls_back(fast, form, LINEAR_WRAPPERS[wrapping][1])
    if wrapping == "meta weight":  # plain PyTorch returns uninitialised memory or raises
        outcomes = [outcome(module, form) for module in (fast, plain)]
        assert isinstance(outcomes[0], dict) == isinstance(outcomes[1], dict)
    else:
        assert_same(fast, plain, form)
    assert counted()
    if wrapping.removesuffix(" hook") in HOOKS:
        ours, theirs = (m.get_submodule(FORMS[form].linear).fired for m in (fast, plain))
        assert ours == theirs > 0


@every_form
def test_global_module_hooks_fall_back(form, monkeypatch):
    plain, fast = pair(form)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: y + 1 if isinstance(module, nn.Linear) else None
    )
    try:
        assert_falls_back(fast, form, "global module hooks")
        assert_same(fast, plain, form)
    finally:
        handle.remove()
    assert counted()
    vlm_fast.stats(reset=True)
    assert_fused(fast, plain, form)
    right = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: right(self, x) * 2)
    assert_falls_back(fast, form, "Linear.forward has been replaced")
    assert_same(fast, plain, form)


@every_form
def test_removed_hook_leaves_no_trace(form):
    plain, fast = pair(form)
    handle = fast.get_submodule(FORMS[form].linear).register_forward_hook(lambda *_: None)
    assert_falls_back(fast, form, "it has hooks")
    handle.remove()
    assert_fused(fast, plain, form)


@every_form
def test_parameter_hooks_fire_when_fused(form):
    plain, fast = pair(form)
    fired = []
    for module in (plain, fast):
        linear = module.get_submodule(FORMS[form].linear)
        linear.weight.register_hook(lambda grad: fired.append(1) or grad * 2)
    assert_fused(fast, plain, form)
    assert len(fired) == 2


@every_form
def test_functional_call_is_fused(form):
    plain, fast = pair(form)
    other = {name: p.detach() * 1.1 for name, p in plain.named_parameters()}
    given = inputs(form)
    options = dict(kwargs=given, args=()) if isinstance(given, dict) else dict(args=given)
    with vlm_fast.strict():
        ours = torch.func.functional_call(fast, other, **options)
    theirs = torch.func.functional_call(plain, other, **options)
    first = lambda y: getattr(y, "last_hidden_state", y)  # noqa: E731
    ours, theirs = (first(y[0] if type(y) is tuple else y) for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, call(fast, given), rtol=1e-3)


@every_form
def test_inference_mode_parameters_are_fused(form):
    plain, fast = pair(form)
    with torch.inference_mode():
        for module in (plain, fast):
            linear = module.get_submodule(FORMS[form].linear)
            linear.weight = nn.Parameter(linear.weight.clone())
        assert linear.weight.is_inference()
        with vlm_fast.strict():
            ours = call(fast, inputs(form))
        torch.testing.assert_close(ours, call(plain, inputs(form)), rtol=1e-4, atol=1e-5)


@every_form
def test_connector_hooks_fire_in_the_same_order(form):
    """Module hooks and tensor hooks fire in the same order, and the connector is fused."""
    plain, fast = pair(form)

    def order(module):
        fired = []
        note = lambda what: lambda *_: fired.append(what)  # noqa: E731
        for kind in (
            HOOKS[:2] if "Former" in form else HOOKS
        ):  # torch has no backward hooks for dicts
            getattr(module, f"register_{kind}_hook")(note(kind))
        given = inputs(form)
        leaves = list(given.values() if isinstance(given, dict) else given)
        for i, leaf in enumerate(leaves[:2]):
            leaf.requires_grad_().register_hook(note(f"input {i}"))
        y = call(module, given)
        y.register_hook(note("output"))
        y.square().sum().backward()
        return fired

    with vlm_fast.strict():
        ours = order(fast)
    assert ours == order(plain) and len(ours) >= 5


@pytest.mark.parametrize("form", ["patched LLaVA projector", "MLPProjector"])
def test_activation_hook_fires(form):
    plain, fast = pair(form)
    for module in (plain, fast):
        module.act.register_forward_hook(lambda module, args, y: y * 3)
    assert_falls_back(fast, form, "act: it has hooks")
    assert_same(fast, plain, form)


def test_instance_forward_is_kept():
    module = projector()
    module.forward = types.MethodType(lambda self, x: x, module)
    with pytest.warns(UserWarning, match="its forward has been replaced"):
        report = vlm_fast.patch(module)
    assert not report.patched
