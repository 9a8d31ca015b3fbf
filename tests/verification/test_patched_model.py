"""`vlm_fast.verify` on whole models: verdicts, and no side effects on the model."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import vlm_fast
from tests.support.tiny_llava import llava, prompt
from tests.support.tiny_qformers import SMALL, blip2, images
from vlm_fast.patching.models.mlp import FusedMLP
from vlm_fast.verification import model_runs


def patched(dtype=torch.float32):
    model, inputs = llava(dtype=dtype), prompt(dtype)
    vlm_fast.patch(model)
    return model, inputs


def caching_first_result(method):
    """A method that caches its first result and returns it when gradients are disabled."""
    answers = []

    def stale(self, *args, **kwargs):
        if torch.is_grad_enabled():
            return method(self, *args, **kwargs)
        if not answers:
            answers.append(method(self, *args, **kwargs))
        return answers[0]

    return stale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stale_result_fails(dtype, monkeypatch):
    model, inputs = patched(dtype)
    assert vlm_fast.verify(model, **inputs).ok
    monkeypatch.setattr(FusedMLP, "forward", caching_first_result(FusedMLP.forward))
    with torch.no_grad():
        model(**{**inputs, "pixel_values": torch.randn_like(inputs["pixel_values"])})
    found = vlm_fast.verify(model, **inputs)
    assert all(connector.ok for connector in found.connectors)  # each connector by itself is right
    assert not found.ok and "FAIL output" in str(found)
    wrong = [verdict.what for verdict in found.outputs if not verdict.ok]
    assert wrong[0] == "logits" and len(found.outputs) > 1


def test_stale_derived_weight_fails(monkeypatch):
    """A derived weight is cached, and its source is written to afterwards."""
    model, inputs = patched()
    projector = model.model.multi_modal_projector
    kept = copy.deepcopy(projector.linear_2.weight)
    right = FusedMLP.forward

    def stale(self, *args, **kwargs):
        if torch.is_grad_enabled() or self.linear_2.weight is kept:
            return right(self, *args, **kwargs)
        current, self.linear_2.weight = self.linear_2.weight, kept
        try:
            return right(self, *args, **kwargs)
        finally:
            self.linear_2.weight = current

    monkeypatch.setattr(FusedMLP, "forward", stale)
    assert vlm_fast.verify(model, **inputs).ok
    projector.linear_2.weight.data.mul_(1.01)
    assert not vlm_fast.verify(model, **inputs).ok


def test_model_runs_without_hooks(monkeypatch):
    """Hooks may make a layer fall back and so hide a fault of the fast path."""
    model, inputs = patched()
    right = FusedMLP.forward

    def wrong_when_fast(self, *args, **kwargs):
        result = right(self, *args, **kwargs)
        return result if self._forward_hooks or self._forward_pre_hooks else result * 1.01

    monkeypatch.setattr(FusedMLP, "forward", wrong_when_fast)
    found = vlm_fast.verify(model, **inputs)
    assert [verdict.what for verdict in found.outputs if not verdict.ok][:1] == ["logits"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_rounding_differences_pass(dtype, seed):
    model, inputs = patched(dtype)
    torch.manual_seed(seed)
    inputs["pixel_values"] = torch.randn_like(inputs["pixel_values"])
    found = vlm_fast.verify(model, **inputs, labels=inputs["input_ids"], output_hidden_states=True)
    assert found.ok, found
    assert {"loss", "logits"} <= {verdict.what for verdict in found.outputs}


def test_amplified_rounding_errors_pass():
    """A model may amplify the rounding of its connector, which is no fault of the connector."""

    class Amplifies(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **inputs):
            hidden = self.inner(**inputs).logits
            return torch.sin(1e5 * hidden)

    model, inputs = patched()
    plain = llava()
    with torch.no_grad():
        perturbed = [torch.sin(1e5 * m(**inputs).logits) for m in (model, plain)]
    found = vlm_fast.verify(Amplifies(model), **inputs)
    assert found.ok, found
    assert (perturbed[0] - perturbed[1]).abs().max() > 1e-3  # far more than rounding


# ---- dropout ----


def with_dropout():
    torch.manual_seed(0)
    model = blip2(**SMALL, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()
    vlm_fast.patch(model)
    query = torch.randn(1, 4, 48).expand(3, -1, -1)
    return model, {"query_embeds": query, "encoder_hidden_states": images(3, 7, 40)}


def test_different_dropout_masks_do_not_fail(monkeypatch):
    model, given = with_dropout()
    found = vlm_fast.verify(model, **given)
    assert found.ok and not found.outputs and "dropout" in found.incomparable, found
    assert "not judged" in str(found)
    assert [c.what for c in found.connectors] == ["FusedQFormerModel without dropout"]
    assert not found.unreached
    assert all(module.training for module in model.modules())
    # The connector is judged nevertheless.
    right = vlm_fast.ops.qformer_layer._path.forward

    def wrong(*args, **options):
        y, saved = right(*args, **options)
        return y * 1.01, saved

    monkeypatch.setattr(vlm_fast.ops.qformer_layer._path, "forward", wrong)
    assert not vlm_fast.verify(model, **given).ok


def test_train_and_eval_modes_are_unchanged():
    model, given = with_dropout()
    model.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    vlm_fast.verify(model, **given)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


# ---- buffers ----


class Counts(nn.Module):
    """A wrapper of a patched model whose forward changes buffers of several kinds."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("added_to", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("cached", torch.zeros(2), persistent=False)
        self.register_buffer("by_data", torch.zeros(2))
        self.register_buffer("unset", None)
        self.fails = False

    def forward(self, **inputs):
        self.norm(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
        self.added_to += 1
        self.replaced = self.replaced + 1
        self.cached = torch.ones(7)
        self.by_data.data = torch.ones(3)
        self.unset = torch.ones(1)
        self.register_buffer("late", torch.ones(1), persistent=False)
        if self.fails:
            raise KeyError("midway")
        logits = self.inner(**inputs).logits
        return logits + self.added_to.sum()  # every run has to start with the same values


def state_of(model):
    return {
        name: (buffer, buffer.data_ptr(), buffer.clone())
        for name, buffer in model.named_buffers()
    }  # fmt: skip


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_are_unchanged(fails):
    inner, inputs = patched()
    model = Counts(inner).train()
    model.fails = fails
    before, keys = state_of(model), list(model.state_dict())
    if fails:
        with pytest.raises(KeyError):
            vlm_fast.verify(model, **inputs)
    else:
        found = vlm_fast.verify(model, **inputs)
        assert found.ok, found
    after = state_of(model)
    assert list(after) == list(before) and list(model.state_dict()) == keys
    for name, (buffer, address, value) in before.items():
        assert after[name][0] is buffer and after[name][1] == address, name
        assert torch.equal(after[name][2], value), name
    assert model.unset is None and "unset" in model._buffers


def test_past_key_values_are_unchanged():
    """Each run starts with the given cache, and no run extends it."""
    model, inputs = patched()
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    length = cache.get_seq_length()
    mask = torch.ones(len(inputs["input_ids"]), length + 2, dtype=torch.long)
    ids = torch.full((len(mask), 2), 9)
    found = vlm_fast.verify(model, input_ids=ids, attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == length
    assert all(verdict.ok for verdict in found.outputs), found


def test_different_output_names_or_shapes_fail():
    one = model_runs.ModelRun({"a": torch.zeros(2)}, False)
    other = model_runs.ModelRun({"a": torch.zeros(2), "b": torch.zeros(2)}, False)
    (verdict,) = model_runs.judge_outputs(one, other, lambda draw: other)
    assert not verdict.ok and verdict.what == "b"
    wide = model_runs.ModelRun({"a": torch.zeros(3)}, False)
    assert not model_runs.judge_outputs(one, wide, lambda draw: wide)[0].ok


@dataclasses.dataclass
class Returned:
    pair: tuple
    text: str


class OfItsOwnKind(dict):
    """A mapping class that is not registered with pytree."""


@pytest.mark.parametrize("kind", [tuple, list, Returned, OfItsOwnKind, torch.Tensor])
def test_outputs_are_found_in_nested_results(kind, monkeypatch):
    class Wraps(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **inputs):
            logits = self.inner(**inputs).logits
            if kind is torch.Tensor:
                return logits
            if kind is Returned:
                return Returned((None, logits), "as it is")
            return OfItsOwnKind(a=[logits]) if kind is OfItsOwnKind else kind([3, logits])

    inner, inputs = patched()
    model = Wraps(inner)
    (verdict,) = vlm_fast.verify(model, **inputs).outputs
    assert verdict.ok
    monkeypatch.setattr(FusedMLP, "forward", caching_first_result(FusedMLP.forward))
    with torch.no_grad():
        model(**{**inputs, "pixel_values": torch.randn_like(inputs["pixel_values"])})
    assert not vlm_fast.verify(model, **inputs).ok


def test_ok_requires_outputs_and_connectors_to_pass():
    model, inputs = patched()
    found = vlm_fast.verify(model, **inputs)
    wrong = dataclasses.replace(found.outputs[0], failure="wrong")
    assert not dataclasses.replace(found, outputs=[wrong]).ok
    assert not dataclasses.replace(found, connectors=[]).ok
