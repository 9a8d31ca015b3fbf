"""A patched LLaVA matches unpatched: outputs, loss, gradients, generation, checkpoints."""

import copy

import pytest
import torch

import vlm_fast
from tests.support.cases import assert_right
from tests.support.tiny_llava import llava, prompt
from tests.support.whole_models import step

SIZES = pytest.mark.parametrize("size", ["tiny", "real-width"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def known(found):
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@SIZES
@DTYPES
def test_training_step_and_generation_match_unpatched(size, dtype):
    model, inputs = llava(size, dtype), prompt(dtype)
    labelled = inputs | {"labels": inputs["input_ids"]}
    wide = {k: v.double() if v.is_floating_point() else v for k, v in labelled.items()}
    exact = known(step(copy.deepcopy(model).double(), wide))
    plain = copy.deepcopy(model)
    text = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    with vlm_fast.strict():
        report = vlm_fast.patch(model)
        assert list(report.patched) == ["model", "model.multi_modal_projector"]
        vlm_fast.stats(reset=True)
        ours = known(step(model, labelled))
        assert {name: s["fast"] for name, s in vlm_fast.stats().items()} == {
            "mlp": 1, "merge_image_tokens": 1,
        }  # fmt: skip
        assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), text)
    assert ours.keys() == exact.keys()
    assert_right(ours, lambda: known(step(plain, labelled)), exact, "logits", "loss")


def test_patched_projector_trains_compiled_in_one_graph():
    model = llava()
    features = torch.randn(2, 17, 48)
    projector = model.model.multi_modal_projector
    torch._dynamo.reset()

    def run(function):
        x = features.clone().requires_grad_()
        out = function(x[:, 1:])
        return out, *torch.autograd.grad(out.square().sum(), [x, *projector.parameters()])

    expected = run(projector)
    vlm_fast.patch(model)
    for ours, theirs in zip(run(torch.compile(projector, fullgraph=True)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_fewer_graph_breaks_than_unpatched():
    model, inputs = llava(), prompt()
    torch._dynamo.reset()
    unpatched = torch._dynamo.explain(model)(**inputs).graph_break_count
    vlm_fast.patch(model)
    torch._dynamo.reset()
    assert torch._dynamo.explain(model)(**inputs).graph_break_count == 0 < unpatched


def test_verify_judges_each_connector():
    model, inputs = llava(dtype=torch.bfloat16), prompt(torch.bfloat16)
    with pytest.raises(ValueError, match="no patched connector"):
        vlm_fast.verify(model, **inputs)
    vlm_fast.patch(model)
    verification = vlm_fast.verify(model, **inputs)
    assert verification.ok and not verification.unreached
    assert [connector.what for connector in verification.connectors] == [
        "merge_image_tokens",
        "FusedMLP",
    ]
    text_only = vlm_fast.verify(model, input_ids=torch.arange(8, 20)[None])
    assert not text_only.ok and len(text_only.unreached) == 2


def test_verify_detects_a_wrong_connector(monkeypatch):
    model, inputs = llava(), prompt()
    vlm_fast.patch(model)
    right = vlm_fast.ops.mlp._path.forward

    def wrong(*args, **options):
        y, saved = right(*args, **options)
        return y * 1.001, saved

    monkeypatch.setattr(vlm_fast.ops.mlp._path, "forward", wrong)
    verification = vlm_fast.verify(model, **inputs)
    assert not verification.ok
    assert "FAIL model.multi_modal_projector" in str(verification)
