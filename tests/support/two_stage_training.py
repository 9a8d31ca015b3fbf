"""Runs LLaVA's two training stages on two processes, with interruptions and resuming.

    python -m tests.support.two_stage_training [FOLDER]

By `accelerate launch` on the CPU, in about three minutes. Each stage runs once without a break,
and once interrupted: the first by SIGTERM, which saves a checkpoint, the second by SIGKILL, which
does not. It ends with an error unless losses fall, a resumed run has the weights of the unbroken
one to the last bit, and the model that was saved loads in plain transformers, in a fresh process,
and answers as the patched one does.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

import vlm_fast
from tests.support import photographs, tiny_llava, tiny_processors

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--main_process_port", "0", "-m", "vlm_fast.cli.main", "recipe",
)  # fmt: skip
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Of a random language model that is frozen, a projector can mend little: 2 % of the loss.
FALLS = {"llava-stage1": 0.99, "llava-stage2": 0.8}
STAGES = {
    "llava-stage1": ("--lr", "5e-3", "--epochs", "8"),
    "llava-stage2": ("--lr", "2e-3", "--epochs", "8"),
}
ANSWER = """
import sys, torch, transformers
from PIL import Image
folder, image, prompt = sys.argv[1:]
model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
processor = transformers.AutoProcessor.from_pretrained(folder)
inputs = processor(images=Image.open(image), text=prompt, return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=16, do_sample=False)[0].tolist())
assert "vlm_fast" not in sys.modules
"""


def launch(stage, model, data, out, *more):
    records, images = data
    arguments = (
        "--model", model, "--data", records, "--images", images, "--out", out,
        "--batch", "16", "--save-every", "6", "--workers", "0", *STAGES[stage], *more,
    )  # fmt: skip
    return subprocess.Popen(
        [*LAUNCH, stage, *map(str, arguments)], env=os.environ | ENVIRONMENT, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished(process, code=0):
    output = process.communicate(timeout=280)[0]
    assert (process.returncode == code) if code == 0 else process.returncode, output
    return output


def interrupt(process, out, how):
    """Interrupt a run after its first complete checkpoint."""
    while not (out / "checkpoint-6" / "files.json").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    if how == signal.SIGTERM:
        process.send_signal(how)  # to the launcher, which hands it on
    else:  # workers are of sessions of their own
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            one.kill()
    return finished(process, code=1)


def same_weights(ours, theirs):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]


def answers(folder, data):
    """Generated answers of the patched model, and of plain transformers in a new process."""
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    image = sorted(data[1].iterdir())[0]
    prompt = "USER: <image>\nDescribe the picture. ASSISTANT:"
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    vlm_fast.patch(model)
    inputs = AutoProcessor.from_pretrained(folder)(
        images=Image.open(image), text=prompt, return_tensors="pt"
    )
    ours = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0].tolist()
    plain = subprocess.run(
        [sys.executable, "-c", ANSWER, str(folder), str(image), prompt],
        cwd="/", capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return ours, json.loads(plain.splitlines()[-1])


def stage(name, model, data, folder, how):
    """Run a stage twice; return the folder with the resumed run's model."""
    unbroken, broken = folder / f"{name}-unbroken", folder / f"{name}-broken"
    start = time.perf_counter()
    finished(launch(name, model, data, unbroken))
    unbroken_seconds = time.perf_counter() - start
    output = interrupt(launch(name, model, data, broken), broken, how)
    assert not (broken / "model.safetensors").exists(), "it had ended before it was interrupted"
    if how == signal.SIGTERM:
        assert "SIGTERM: saving a checkpoint" in output and "go on with --resume" in output, output
    again = finished(launch(name, model, data, broken, "--resume"))
    resumed = next(line for line in again.splitlines() if "recipe: from checkpoint-" in line)
    found = losses(broken)
    assert found == losses(unbroken)
    assert sum(found[-6:]) < FALLS[name] * sum(found[:6]), found
    assert same_weights(unbroken, broken)
    print(
        f"{name}: {len(found)} steps, loss {found[0]:.3f} to {found[-1]:.3f}; {how.name}, then "
        f"{resumed.removeprefix('recipe: ')}; weights bitwise equal; "
        f"{unbroken_seconds:.0f} s without interruption"
    )
    return broken


def main(folder):
    start = time.perf_counter()
    data = photographs.write(folder / "data")
    tiny_llava.llava().save_pretrained(folder / "model")
    tiny_processors.llava().save_pretrained(folder / "model")
    model = stage("llava-stage1", folder / "model", data, folder, signal.SIGTERM)
    model = stage("llava-stage2", model, data, folder, signal.SIGKILL)
    ours, plain = answers(model, data)
    assert ours == plain, (ours, plain)
    print(f"plain transformers answers the same: {len(ours)} tokens")
    print(f"two stages: {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
