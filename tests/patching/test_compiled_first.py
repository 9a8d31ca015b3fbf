"""A patched model compiles to one graph before its first eager call."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vlm_fast
from tests.support.distributed_helpers import start
from tests.support.selection import slow_except
from tests.support.tiny_models import build

ROOT = Path(__file__).resolve().parents[2]
# Models that collect hidden states of their tower, and others. Video-LLaVA has two towers.
ONE_GRAPH = (
    "llava", "llava of two layers", "vipllava", "video_llava", "videos of video_llava",
    "deepseek_vl", "internvl", "paligemma", "aya_vision",
)  # fmt: skip


def built(name):
    model, inputs = build(name.removeprefix("videos of "))
    if name.startswith("videos of "):
        del inputs["pixel_values_images"]
        inputs["input_ids"][inputs["input_ids"] == model.config.image_token_index] = 9
    return model, inputs


def one_graph(number):
    torch.manual_seed(0)
    model, inputs = built(ONE_GRAPH[number])
    fast = copy.deepcopy(model)
    vlm_fast.patch(fast)
    with torch.no_grad():
        compiled = torch.compile(fast.model, fullgraph=True, backend="aot_eager")
        found = compiled(**inputs)[0]
        expected = model.model(**inputs)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(fast.model(**inputs)[0], expected, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(compiled(**inputs)[0], expected, rtol=1e-4, atol=2e-6)


@pytest.mark.multiprocess
@pytest.mark.parametrize("first", slow_except([0], range(0, len(ONE_GRAPH), 3)))
def test_one_graph_before_first_call(first):
    """Runs in new processes in which no test compiled or called a model before."""
    start(one_graph_of, (first,), min(3, len(ONE_GRAPH) - first))


def one_graph_of(number, first):
    one_graph(first + number)


SCRIPT = """
import torch, vlm_fast
from tests.support.tiny_llava import llava, prompt
model = llava()
vlm_fast.patch(model)
output = torch.compile(model.model, fullgraph=True, backend="aot_eager")(**prompt())
output.last_hidden_state.sum().backward()
assert model.model.multi_modal_projector.linear_1.weight.grad is not None
"""


@pytest.mark.slow
def test_forward_and_backward_compile_to_one_graph_in_new_process():
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("name", ["llava", "video_llava"])
def test_hidden_states_are_collected_once(name):
    """transformers' hooks are set once, whether it or the patch sets them first."""
    model, inputs = build(name)
    hooks = lambda m: sum(len(module._forward_hooks) for module in m.modules())  # noqa: E731
    plain, fast = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        expected = plain(**inputs, output_hidden_states=True)
        vlm_fast.patch(fast)
        pickle.dumps(fast)  # the hooks cannot be pickled and are not set yet
        assert hooks(fast) == 0
        torch._dynamo.reset()
        torch.compile(fast.model, backend="eager")(**inputs)
        found = fast(**inputs, output_hidden_states=True)
    assert hooks(fast) == hooks(plain)
    assert len(found.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


def test_patched_model_has_no_additional_methods():
    model, _ = build("llava")
    vlm_fast.patch(model)
    assert not hasattr(model.model, "get_video_features")
