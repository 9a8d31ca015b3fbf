"""A recipe with LoRA adapters resumes bitwise equal from its last checkpoint."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.support import photographs
from tests.support.selection import slow_except
from tests.training.test_recipe_command import STAGE1, call, folder_of, llava, weights
from vlm_fast.training.recipes import checkpoints

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "dtype", slow_except([torch.bfloat16], [torch.float32, torch.bfloat16]), ids=["fp32", "bf16"]
)
def test_lora_resume_is_bitwise_equal(tmp_path, dtype):
    data = photographs.write(tmp_path / "data", longest=32, views=("whole",))
    folder = folder_of(tmp_path / "model", llava(dtype))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = (*STAGE1, "--lora", "2", "--max-steps", "3")
    call("llava-stage2", folder, data, whole, *more)
    shutil.copytree(whole, broken)
    last, _ = checkpoints.last_complete(broken)
    assert last.name == "checkpoint-3"
    shutil.rmtree(last)
    shutil.rmtree(broken / "adapter")
    (broken / "model.safetensors").unlink()
    found = call("llava-stage2", folder, data, broken, *more, "--resume")
    assert "from checkpoint-2" in found.output
    ours, theirs, before = weights(broken), weights(whole), weights(folder)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert any("multi_modal" in n and not torch.equal(ours[n], before[n]) for n in ours)
    adapters = [load_file(out / "adapter" / "adapter_model.safetensors") for out in (broken, whole)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][n], adapters[1][n]) for n in adapters[0])
    losses = [(out / "losses.jsonl").read_text().splitlines() for out in (broken, whole)]
    assert [json.loads(line)["loss"] for line in losses[0]] == [
        json.loads(line)["loss"] for line in losses[1]
    ]
