"""Patched whole models inside peft, checkpoint wrappers, autocast and torch.compile match
unpatched, and report fallbacks."""

import copy

import peft
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

import vlm_fast
from tests.support import tiny_flamingos
from tests.support.cases import assert_right
from tests.support.distributed_helpers import start
from tests.support.whole_models import (
    FAMILIES,
    LANGUAGE,
    assert_close,
    distance,
    every_family,
    pair,
    reasons,
    same_logits,
    step,
)

# Each connector that falls back warns once; tests check the reason themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning"),
    pytest.mark.filterwarnings("ignore:no connector of"),
]


def with_lora(model, targets, **options):
    torch.manual_seed(5)
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


# ---- adapters ----


WHERE = [(family, where) for family in FAMILIES for where in ("connector", "language model")]


@pytest.mark.parametrize("family, where", [*WHERE, ("llava", "all-linear")])
def test_lora(family, where):
    """Linears with adapters are called until the adapters are merged; then all is fused again."""
    plain, fast, given = pair(family)
    targets = {"connector": FAMILIES[family].lora_targets, "language model": LANGUAGE}
    targets = targets.get(where, where)
    plain, fast = (with_lora(m, targets) for m in (plain, fast))
    assert_close(step(fast, given), step(plain, given))
    adapters = [p for n, p in fast.named_parameters() if "lora_" in n and "vision" not in n]
    assert adapters and all(p.grad is not None and p.grad.any() for p in adapters)
    if where == "language model":
        assert not reasons(fast)
    else:
        assert all("peft.tuners.lora" in reason for reason in reasons(fast)) and reasons(fast)
    plain, fast = (m.merge_and_unload() for m in (plain, fast))
    assert not reasons(fast)
    with vlm_fast.strict():
        same_logits(fast, plain, given)


@every_family
def test_unloading_adapters_restores_the_model(family):
    plain, fast, given = pair(family)
    names, classes = list(fast.state_dict()), [type(m) for m in fast.modules()]
    unloaded = with_lora(fast, FAMILIES[family].lora_targets).unload()
    assert list(unloaded.state_dict()) == names
    assert [type(m) for m in unloaded.modules()] == classes
    with vlm_fast.strict():
        same_logits(unloaded, plain, given)


@every_family
def test_patch_inside_a_peft_model(family):
    """Patch after peft, also with the adapter disabled."""
    plain, _, given = pair(family)
    expected = step(with_lora(copy.deepcopy(plain), FAMILIES[family].lora_targets), given)
    wrapped = with_lora(copy.deepcopy(plain), FAMILIES[family].lora_targets)
    vlm_fast.patch(wrapped, strict=True)
    assert_close(step(wrapped, given), expected)
    with wrapped.disable_adapter():
        same_logits(wrapped, plain, given)


SAVED = {
    "llava": "multi_modal_projector", "blip2": "qformer", "idefics": "perceiver_resampler",
    "mllama": "multi_modal_projector",
}  # fmt: skip


@every_family
def test_modules_to_save(family):
    """The trained copy is patched like its original and replaces it after unloading."""
    plain, fast, given = pair(family)
    patched = len(vlm_fast.explain(fast))
    plain, fast = (with_lora(m, LANGUAGE, modules_to_save=[SAVED[family]]) for m in (plain, fast))
    with vlm_fast.strict():
        assert_close(step(fast, given), step(plain, given))
    copies = {n: p for n, p in fast.named_parameters() if f"{SAVED[family]}.modules_to_save" in n}
    assert copies and any(p.grad is not None and p.grad.any() for p in copies.values())
    assert all(p.requires_grad for p in copies.values())
    with torch.no_grad():
        for model in (plain, fast):
            for name, parameter in model.named_parameters():
                if name in copies:
                    parameter.mul_(1.1)
    plain, fast = (m.merge_and_unload() for m in (plain, fast))
    assert len(vlm_fast.explain(fast)) == patched
    with vlm_fast.strict():
        same_logits(fast, plain, given)


# ---- training ----


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@every_family
def test_gradient_checkpointing_with_lora(family, reentrant):
    """Checkpointing of the whole model gives the gradients of a run without it."""
    targets = f"{FAMILIES[family].lora_targets}|{LANGUAGE}"
    plain, fast, given = pair(family)
    plain, fast = (with_lora(m, targets).train() for m in (plain, fast))
    expected = step(plain, given)
    for model in (plain, fast):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        assert model.is_gradient_checkpointing
    if (
        family == "mllama" and reentrant
    ):  # it passes images by keyword, which reentrant checkpointing drops
        for model in (plain, fast):
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                step(model, given)
        return
    assert_close(step(fast, given), expected)


@every_family
def test_layers_in_torch_checkpoint_wrapper(family):
    """The wrapper that accelerate and FSDP trainers apply to layers."""
    plain, fast, given = pair(family)
    given["use_cache"] = False  # a recomputed layer would write to the cache twice
    expected = step(plain, given)
    step(fast, given)
    ops = vlm_fast.stats(reset=True)
    units = [fast.get_submodule(name) for name in FAMILIES[family].connectors]
    units = list(units[0].encoder.layer) if family == "blip2" else units
    apply_activation_checkpointing(fast, check_fn=lambda module: module in units)
    with vlm_fast.strict():
        found = step(fast, given)
    assert vlm_fast.stats().keys() == ops.keys()
    assert_close(
        {n.replace("_checkpoint_wrapped_module.", ""): t for n, t in found.items()}, expected
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_family
def test_autocast(family, dtype):
    """Logits have the autocast dtype, gradients are float32, errors are as small as unpatched."""
    plain, fast, given = pair(family)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    true = copy.deepcopy(plain).double()
    true.set_attn_implementation("sdpa")  # eager attention computes softmax in fp32
    exact = step(true, wide)

    def within(model):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype):
            output = model(**given)
        output.loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return output.logits.detach(), found

    with vlm_fast.strict():
        logits, gradients = within(fast)
    native, native_gradients = within(plain)
    assert logits.dtype == native.dtype == dtype
    assert_right({"logits": logits}, lambda: {"logits": within(plain)[0]}, exact, "logits")
    assert gradients.keys() == native_gradients.keys()
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    ours, theirs = (distance(found, exact) for found in (gradients, native_gradients))
    assert 0 < ours <= 1.25 * theirs


@every_family
def test_accumulated_gradients_match_one_batch(family):
    """Four micro-batches of a row each."""
    plain, fast, given = pair(family)
    given = {name: torch.cat((value, value)) for name, value in given.items()}
    given["pixel_values"] = given["pixel_values"] + torch.linspace(0, 1, 4).view(
        4, *[1] * (given["pixel_values"].ndim - 1)
    )
    labels = given.pop("labels")
    expected, found = {}, {}
    for model, rows, into in ((plain, [slice(0, 4)], expected), (fast, range(4), found)):
        for row in rows:
            rows_of = slice(row, row + 1) if isinstance(row, int) else row
            micro = {name: value[rows_of] for name, value in given.items()}
            logits = model(**micro).logits
            targets = labels[rows_of].clamp(min=0)
            logits.log_softmax(-1).gather(2, targets.unsqueeze(-1)).mean((1, 2)).sum().backward()
        into.update({name: p.grad for name, p in model.named_parameters()})
    assert_close(found, expected)


@every_family
def test_main_gradients_in_fp32(family):
    """As in Megatron: fp32 gradients beside bf16 parameters, accumulated over four batches."""
    plain, fast, given = pair(family)
    exact = {n: g for n, g in step(plain, given).items() if g is not None}
    del exact["logits"], exact["loss"]
    given = {n: t.bfloat16() if t.is_floating_point() else t for n, t in given.items()}
    apart = []
    for model in (fast.bfloat16(), plain.bfloat16()):
        main = {p: torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()}

        def take(parameter, main=main):
            main[parameter] += parameter.grad
            parameter.grad = None

        for parameter in main:
            parameter.register_post_accumulate_grad_hook(take)
        for _ in range(4):
            model(**given).loss.backward()
        named = dict(model.named_parameters())
        apart.append(distance({name: main[named[name]] / 4 for name in exact}, exact))
    assert 0 < apart[0] <= 1.25 * apart[1]


COMPILED = ("blip2", "idefics", "mllama")  # LLaVA is in `test_llava`


def compiles_into_one_graph(number):
    family = COMPILED[number]
    if family == "idefics":  # with four layers transformers' own forward breaks the graph
        plain = tiny_flamingos.idefics(num_hidden_layers=2)
        fast, given = copy.deepcopy(plain), tiny_flamingos.idefics_inputs()
        vlm_fast.patch(fast)
    else:
        plain, fast, given = pair(family)
    given.pop("labels", None)
    graphs = CompileCounterWithBackend("eager")
    same_logits(torch.compile(fast, backend=graphs), plain, given)
    assert graphs.frame_count == 1, dict(counters["graph_break"])


@pytest.mark.multiprocess
@pytest.mark.slow
def test_whole_model_compiles_to_one_graph():
    """Runs in new processes: Dynamo breaks graphs after many other tests, even when reset."""
    start(compiles_into_one_graph, (), len(COMPILED))
