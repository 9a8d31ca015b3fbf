"""The example scripts with tiny models, run as a new user runs them."""

import contextlib
import importlib
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from peft import PeftModel
from transformers import Blip2ForImageTextRetrieval

import vlm_fast
from tests.support import photographs, tiny_llava, tiny_processors

EXAMPLES = Path(__file__).parents[2] / "examples"
# Modules that processes need, imported once; none starts a thread, which a fork would lose.
PRELOAD = [
    "pytest", "peft", "accelerate", "vlm_fast.training.data", "torch.distributed",
    "transformers.trainer",
    *(f"transformers.models.{f}.modeling_{f}" for f in ("blip_2", "clip", "llama", "llava", "opt")),
]  # fmt: skip
SCRIPTS = ("finetune_llava_lora", "serve_qformer", "train_blip2_stage1")


def module(name):
    """Import a module of the examples folder."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def run(name, *arguments):
    before, sys.argv = sys.argv, [f"{name}.py", *map(str, arguments)]
    try:
        return module(name).main()
    finally:
        sys.argv = before


def test_example_scripts_are_all_tested_and_short():
    scripts = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == {*SCRIPTS, "toy_models"}
    assert all(len(scripts[name].splitlines()) <= 60 for name in SCRIPTS)
    assert all(name in (EXAMPLES / "README.md").read_text() for name in scripts)


def test_lora_of_patched_llava_loads_in_plain_peft(tmp_path):
    with vlm_fast.strict():
        trainer = run("finetune_llava_lora", "--output", tmp_path)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert set(vlm_fast.explain(trainer.model).values()) == {None}

    base, examples, _ = module("toy_models").llava("", "", "")
    assert not vlm_fast.explain(base)
    batch = torch.utils.data.default_collate(examples[:8])
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        logits, trained = plain(**batch).logits, trainer.model.eval()(**batch).logits
        with plain.disable_adapter():
            untrained = plain(**batch).logits
    torch.testing.assert_close(logits, trained)
    assert (logits - untrained).abs().max() > 0.1


@pytest.mark.slow
def test_lora_with_local_model_and_data(tmp_path):
    tiny_llava.llava().save_pretrained(tmp_path / "model")
    tiny_processors.llava().save_pretrained(tmp_path / "model")
    records, images = photographs.write(tmp_path, longest=32, views=("whole",))
    yours = ("--model", tmp_path / "model", "--data", records, "--images", images)
    with vlm_fast.strict():
        run("finetune_llava_lora", *yours, "--steps", 2, "--output", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_retrieval_pairs_with_local_model_and_data(tmp_path):
    """All batches have the same text length, as ranks need."""
    module("toy_models").retrieval("", "", "")[0].save_pretrained(tmp_path / "model")
    tiny_processors.blip2().save_pretrained(tmp_path / "model")
    records, images = photographs.write(tmp_path, longest=32, views=("whole",))
    model, pairs, collate = module("toy_models").retrieval(str(tmp_path / "model"), records, images)
    batch = collate([pairs[0], pairs[5]])
    assert len(pairs) == len(photographs.PHOTOGRAPHS)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 32)
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}
    assert model.vision_model(batch["pixel_values"]).last_hidden_state.shape == (2, 17, 48)


def test_served_qformer_matches_transformers(capsys):
    served, eager = run("serve_qformer", "--requests", 5)
    torch.testing.assert_close(served, eager)
    said = capsys.readouterr().out
    assert ("no GPU, so no CUDA graph" in said) != torch.cuda.is_available()
    p50, p90, p99 = map(float, re.search(r"p50 (\S+), p90 (\S+), p99 (\S+)", said).groups())
    assert 0 < p50 <= p90 <= p99


def _rank(rank, folder, port):
    """Set what torchrun sets for a process, and write its output to a file."""
    torch.set_num_threads(1)
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    with open(f"{folder}/said-{rank}", "w") as file, contextlib.redirect_stdout(file):
        run("train_blip2_stage1", "--output", f"{folder}/model")
        torch.distributed.destroy_process_group()


def test_stage1_runs_on_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.get_context("forkserver").set_forkserver_preload(PRELOAD)
    mp.start_processes(_rank, (str(tmp_path), port), nprocs=2, start_method="forkserver")
    said = (tmp_path / "said-0").read_text()
    losses = [float(loss) for loss in re.findall(r"on 2 processes: loss (\S+)", said)]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0], said
    assert not (tmp_path / "said-1").read_text()

    before = dict(module("toy_models").retrieval("", "", "")[0].named_parameters())
    trained = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "model")
    for name, value in trained.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith("vision_model."), name
