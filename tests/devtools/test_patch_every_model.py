"""The pytest plugin that patches every model, in small test suites."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

TESTS = Path(__file__).resolve().parents[1]
SUITE = """
import torch
import transformers
import vlm_fast
from vlm_fast.patching import patched_modules

CONFIG = dict(
    vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=24, encoder_hidden_size=12,
)

def qformer():
    return transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**CONFIG)).eval()

def classes(model):
    return {type(module).__name__ for _, module in patched_modules(model)}

def test_a_model(patched):
    model = qformer()
    assert ("Blip2QFormerLayer" in classes(model)) == patched
    model(query_embeds=torch.randn(2, 4, 16), encoder_hidden_states=torch.randn(2, 3, 12))

def test_a_model_inside_a_model(patched):
    vision = dict(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4,
    )
    config = transformers.LlavaConfig(
        vision_config=dict(vision, model_type="clip_vision_model"),
        text_config=dict(CONFIG, model_type="llama"),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    assert (classes(model) >= {"LlavaModel", "LlavaMultiModalProjector"}) == patched

def test_a_checkpoint(patched, tmp_path):
    model = qformer()
    model.save_pretrained(tmp_path)
    read = transformers.Blip2QFormerModel.from_pretrained(tmp_path)
    assert classes(read) == classes(model) and bool(classes(read)) == patched
    for name, value in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], value)

def test_a_model_without_connectors():
    transformers.LlamaModel(transformers.LlamaConfig(**CONFIG))
"""
CONFTEST = """
import pytest

def pytest_addoption(parser):
    parser.addoption("--patched", action="store_true")

@pytest.fixture
def patched(request):
    return request.config.getoption("patched")
"""


def run(folder, *options):
    folder.joinpath("test_models.py").write_text(SUITE)
    folder.joinpath("conftest.py").write_text(CONFTEST)
    folder.joinpath("pytest.ini").write_text("[pytest]\nfilterwarnings = error::UserWarning\n")
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS / "tools")))
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}, cwd=folder,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert found.returncode == 0 and "4 passed" in found.stdout, found.stdout + found.stderr
    return found.stdout


def test_plugin_patches_models_and_prints_summary(tmp_path):
    said = run(tmp_path, "-p", "patch_every_model", "--patched")
    assert "Blip2QFormerLayer by FusedQFormerLayer" in said
    assert "calls were fused" in said


@pytest.mark.slow
def test_models_are_unpatched_without_plugin(tmp_path):
    assert "patched" not in run(tmp_path)
