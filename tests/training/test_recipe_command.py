"""``vlm-fast recipe``: errors, saved files, and resuming after an interruption."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.support import photographs, tiny_blip2, tiny_flamingos, tiny_llava, tiny_processors
from tests.support.selection import slow_except
from vlm_fast.cli import main
from vlm_fast.training.data import ReplacedRecordWarning
from vlm_fast.training.recipes import checkpoints, run

ROOT = Path(__file__).resolve().parents[2]
STAGE1 = ("--batch", "4", "--device-batch", "2", "--lr", "5e-3", "--save-every", "1",
          "--workers", "0")  # fmt: skip


def llava(dtype=torch.float32):
    return tiny_llava.llava(dtype=dtype), tiny_processors.llava()


def blip2(kind):
    config = transformers.Blip2Config(
        vision_config=tiny_blip2.VISION | dict(image_size=28, patch_size=14),
        qformer_config=tiny_blip2.QFORMER
        | dict(vocab_size=130, use_qformer_text_input=kind == "blip2-stage1"),
        text_config=dict(
            model_type="opt", hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            ffn_dim=24, vocab_size=130, max_position_embeddings=64, word_embed_proj_dim=16,
            dropout=0.5,
        ),
        num_query_tokens=4, image_text_hidden_size=8,
    )  # fmt: skip
    kinds = {"blip2-stage1": "ImageTextRetrieval", "blip2-stage2": "ConditionalGeneration"}
    model = getattr(transformers, f"Blip2For{kinds[kind]}")(config)
    torch.nn.init.normal_(model.query_tokens)
    return model, tiny_processors.blip2()


def idefics():
    vision = dict(embed_dim=40, image_size=28, patch_size=7, num_attention_heads=4,
                  num_hidden_layers=1, intermediate_size=48)  # fmt: skip
    model = tiny_flamingos.idefics("sdpa", vocab_size=130, vision_config=vision)
    return model, tiny_processors.idefics()


def folder_of(folder, made):
    for part in made:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return photographs.write(tmp_path_factory.mktemp("data"), longest=32, views=("whole",))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return folder_of(tmp_path_factory.mktemp("model"), llava())


def arguments(name, model, data, out, *more):
    named = ("--model", model, "--data", data[0], "--images", data[1], "--out", out)
    return ["recipe", name, *map(str, (*named, *more))]


def call(*all_of_it, code=0):
    found = CliRunner().invoke(main.app, arguments(*all_of_it))
    assert found.exit_code == code, (found.output, found.exception)
    return found


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_recipes_are_listed_with_hyperparameters():
    text = CliRunner().invoke(main.app, ["recipe"]).stdout
    assert "llava-stage1" in text and "arXiv 2204.14198" in text
    rows = json.loads(CliRunner().invoke(main.app, ["recipe", "--list", "--json"]).stdout)
    assert [row["batch"] for row in rows] == [256, 128, 1680, 1920, 256]


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("llava-stage3", {}, "'llava-stage3' is not one of 'llava-stage1'"),
        ("flamingo", {}, "given a LlavaForConditionalGeneration, of the family llava"),
        ("llava-stage1", {"--model": "nowhere"}, "nowhere has no config.json"),
        ("llava-stage1", {"--data": "nowhere"}, "there is no file nowhere"),
        ("llava-stage1", {"--images": "nowhere"}, "there is no folder nowhere"),
        ("llava-stage1", {"--out": str(ROOT)}, "is not empty: name another, or go on with"),
        ("llava-stage1", {"--batch": "10"}, "a batch of 10 is no multiple of 4 examples"),
        ("llava-stage1", {"--lr": "0"}, "--lr: is 0, expected more"),
        ("llava-stage1", {"--lora": "4"}, "llava-stage1 trains no language model"),
        ("llava-stage2", {"--dtype": "int8"}, "'int8' is not one of"),
        ("llava-stage2", {"--dtype": "float16"}, "float16 is trained in on a GPU alone"),
        ("llava-stage2", {"--format": "v7"}, "'v7' is not one of"),
        ("blip2-stage1", {"--format": "v1"}, "learns captions, which have no format"),
        ("blip2-stage1", {"--device-batch": "1"}, "expected 2 pairs to contrast"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_reported_before_writing(
    monkeypatch, tmp_path, data, model, name, change, words
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    more = [word for pair in change.items() for word in pair]
    found = call(name, model, data, out, *more, code=2)
    said = " ".join(found.output.replace("│", " ").split())
    assert words in said and not out.exists()


def test_missing_packages_are_named(monkeypatch, tmp_path, data, model):
    found = CliRunner().invoke(main.app, ["recipe", "llava-stage1", "--model", str(model)])
    assert found.exit_code == 2 and "--data" in found.output
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "accelerate" else there(n)
    )
    found = call("llava-stage1", model, data, tmp_path / "out", code=3)
    assert "needs accelerate" in found.output
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "DDP" in call("llava-stage1", model, data, tmp_path / "out", code=2).output


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, data, model):
    found = call("llava-stage1", model, data, tmp_path / "out", "--dry-run", "--json",
                 "--batch", "4", "--epochs", "2")  # fmt: skip
    plan = json.loads(found.stdout)
    assert (plan["steps"], plan["accumulation"], plan["examples"]) == (6, 1, 12)
    assert plan["parameters"]["tower"]["learn"] == plan["parameters"]["language"]["learn"] == 0
    assert plan["parameters"]["connector"]["learn"] == plan["parameters"]["connector"]["all"] > 0
    assert not (tmp_path / "out").exists()


@pytest.fixture
def at_batch(monkeypatch):
    """Call a function when the batch of this number is made."""

    def at(number, act):
        made, make = [], run.Collator.__call__

        def make_and_act(self, examples):
            made.append(1)
            if len(made) == number:
                act()
            return make(self, examples)

        monkeypatch.setattr(run.Collator, "__call__", make_and_act)

    yield at


def test_signal_saves_a_checkpoint_and_resuming_is_bitwise_equal(
    tmp_path, data, model, at_batch, monkeypatch
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    call("llava-stage2", model, data, whole, *STAGE1, "--epochs", "2")
    at_batch(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    rarely = ("--epochs", "2", "--save-every", "4")
    found = call("llava-stage2", model, data, broken, *STAGE1, *rarely, code=130)
    assert "SIGTERM: saving a checkpoint" in found.output and "go on with --resume" in found.output
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not (broken / "model.safetensors").exists()
    last, _ = checkpoints.last_complete(broken)
    assert last.name == "checkpoint-2"  # one batch is read ahead
    # As after a run that was killed while it wrote a later checkpoint.
    (broken / "checkpoint-8").mkdir()
    with (broken / "losses.jsonl").open("a") as file:
        file.write('{"loss": 1.0, "step": 4}\n')
    found = call("llava-stage2", model, data, broken, *STAGE1, code=2)
    assert "is not empty" in found.output
    found = call("llava-stage2", model, data, broken, *STAGE1, "--resume", code=2)
    assert "epochs is 1, was 2" in " ".join(found.output.replace("│", " ").split())
    monkeypatch.undo()
    found = call("llava-stage2", model, data, broken, *STAGE1, *rarely, "--resume", "--json")
    assert "passed over: checkpoint-8 is incomplete: it has no files.json" in found.stderr
    summary = json.loads(found.stdout)
    assert summary["resumed_from"] == last.name and summary["steps"] == 6
    assert summary["losses"][1] < summary["losses"][0]
    ours, theirs = weights(broken), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert (broken / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()
    kept = [path.name for _, path, why in checkpoints.list_checkpoints(broken) if why is None]
    assert kept == ["checkpoint-6", "checkpoint-4"]


def test_incomplete_checkpoint_is_not_resumed(tmp_path):
    for step in (1, 2, 3, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"12345")
        checkpoints.mark_complete(folder)
    (tmp_path / "checkpoint-4" / "files.json").write_text("{")
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"123")
    (tmp_path / "checkpoint-2" / "model.safetensors").unlink()
    last, passed = checkpoints.last_complete(tmp_path)
    assert last == tmp_path / "checkpoint-1"
    assert [line.partition(": ")[2] for line in passed] == [
        "its files.json is not JSON", "model.safetensors has 3 bytes, expected 5",
        "model.safetensors is missing",
    ]  # fmt: skip
    checkpoints.rotate(tmp_path, kept=1)
    assert last.exists()


def test_record_failing_in_training_keeps_the_checkpoints(tmp_path, data, model, at_batch):
    records, images = data
    own = tmp_path / "images"
    own.mkdir()
    for path in images.iterdir():
        (own / path.name).write_bytes(path.read_bytes())

    def break_all():
        for path in own.iterdir():
            path.write_bytes(path.read_bytes()[:60])

    at_batch(3, break_all)
    out = tmp_path / "out"
    found = call("llava-stage1", model, (records, own), out, *STAGE1, code=1)
    assert "unreadable image" in found.output and "correct the record" in found.output
    last, _ = checkpoints.last_complete(out)
    assert last is not None and f"{last} is complete" in found.output.replace("\n", " ")
    found = call("llava-stage1", model, (records, own), out, *STAGE1, "--resume", code=1)
    assert "12 unreadable image" in found.output and "nothing was trained" in found.output


def test_bad_records_raise_or_are_skipped(tmp_path, data, model):
    records, images = data
    content = json.loads(records.read_text())
    content[3]["image"] = "nowhere.png"
    content[5]["conversations"][0]["from"] = "robot"
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(content))
    out = tmp_path / "out"
    found = call("llava-stage1", model, (bad, images), out, *STAGE1, code=1)
    assert "record 3" in found.output and "nowhere.png" in found.output and "robot" in found.output
    assert not out.exists()
    found = call("llava-stage1", model, (bad, images), out, *STAGE1, "--on-bad", "skip", "--json")
    summary = json.loads(found.stdout)
    assert (summary["records"], summary["good"]) == (12, 10) and sum(summary["bad"].values()) == 2
    assert (out / "model.safetensors").exists() and summary["replaced"] == 0
    assert summary["steps"] == 3  # of 10 records, two whole batches and a half
    found = call("llava-stage1", model, (bad, images), tmp_path / "short", *STAGE1, "--on-bad",
                 "skip", "--format", "v1", "--max-length", "30", code=1)  # fmt: skip
    assert "10 too long" in found.output and "has no good record" in found.output


@pytest.mark.parametrize("name", slow_except(["llava-stage1"], ["llava-stage1", "blip2-stage2"]))
def test_image_refused_by_processor_raises_or_is_skipped(monkeypatch, tmp_path, data, name):
    torch.manual_seed(0)
    made = llava() if name == "llava-stage1" else blip2(name)
    folder, images = folder_of(tmp_path / "model", made), tmp_path / "images"
    shutil.copytree(data[1], images)
    records = json.loads(data[0].read_text())
    Image.new("RGB", (900, 3)).save(images / records[4]["image"])
    kind = type(made[1].image_processor)
    taken = kind.preprocess

    def preprocess(self, pictures, *more, **options):
        if any(900 in picture.size for picture in pictures):
            raise ArithmeticError("absolute aspect ratio must be smaller than 200")
        return taken(self, pictures, *more, **options)

    monkeypatch.setattr(kind, "preprocess", preprocess)
    found = call(name, folder, (data[0], images), tmp_path / "out", *STAGE1, code=1)
    said = " ".join(found.output.split())
    assert f"record 4 (id '{records[4]['id']}'), image: refused by the processor" in said
    assert f"{records[4]['image']}': ArithmeticError: 'absolute aspect ratio" in said
    more = ("--on-bad", "skip", "--background", "black", "--epochs", "1", "--json")
    with pytest.warns(ReplacedRecordWarning, match="refused by the processor"):
        found = call(name, folder, (data[0], images), tmp_path / "skip", *STAGE1, *more)
    summary = json.loads(found.stdout)
    assert (summary["replaced"], summary["steps"], summary["good"]) == (1, 3, 12)
    assert json.loads((tmp_path / "skip" / "run.json").read_text())["background"] == [0, 0, 0]
    if name == "llava-stage1":  # with truncation each record is checked before training
        short = ("--format", "v1", "--max-length", "200")
        found = call(name, folder, (data[0], images), tmp_path / "new", *STAGE1, *short, code=1)
        assert (
            "1 refused by the processor" in found.output and "nothing was trained" in found.output
        )


@pytest.mark.parametrize(
    "dtype, more",
    [
        (torch.bfloat16, ()),
        (torch.bfloat16, ("--lora", "2")),
        pytest.param(torch.float32, ("--dtype", "bfloat16"), marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, ("--dtype", "float32", "--no-patch"), marks=pytest.mark.slow),
    ],
    ids=["bf16", "bf16 lora", "fp32 in bf16", "bf16 in fp32"],
)
def test_model_is_saved_in_its_original_dtype(tmp_path, data, dtype, more):
    folder, lora = folder_of(tmp_path / "model", llava(dtype)), "--lora" in more
    out = tmp_path / "out"
    call("llava-stage2", folder, data, out, *STAGE1, "--checkpointing", *more)
    before, after = weights(folder), weights(out)
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("vision_tower" in name for name in changed)
    assert any("multi_modal" in n for n in changed) and any("q_proj" in n for n in changed)
    assert lora != any("embed_tokens" in name for name in changed)
    assert lora == (out / "adapter" / "adapter_config.json").exists()
    loaded, told = transformers.LlavaForConditionalGeneration.from_pretrained(
        out, output_loading_info=True
    )
    assert loaded.dtype == dtype
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # A checkpoint keeps fp32 copies of trained parameters, which bf16 would round.
    if not lora:
        kept = weights(checkpoints.last_complete(out)[0])
        assert kept["multi_modal_projector.linear_1.weight"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blip2-stage1", "blip2-stage2", "flamingo"])
def test_other_recipes_run_and_resume(tmp_path, data, name):
    torch.manual_seed(0)
    folder = folder_of(tmp_path / "model", idefics() if name == "flamingo" else blip2(name))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    call(name, folder, data, whole, *STAGE1, "--max-steps", "3")
    shutil.copytree(whole, broken)
    for written_last in (broken / "checkpoint-3" / "files.json", broken / "model.safetensors"):
        written_last.unlink()
    found = call(name, folder, data, broken, *STAGE1, "--max-steps", "3", "--resume")
    assert "from checkpoint-2" in found.output
    ours, theirs, before = weights(broken), weights(whole), weights(folder)
    assert ours.keys() == theirs.keys() == before.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    changed = {n for n in before if not torch.equal(before[n], ours[n])}
    assert changed and not any("vision_model" in n or "language_model" in n for n in changed)
    row = json.loads((whole / "losses.jsonl").read_text().splitlines()[-1])
    if name == "blip2-stage1":
        assert {"itc", "itm", "itg"} <= row.keys()
        assert load_file(whole / "stage1_head.safetensors")["temperature"].shape == ()


@pytest.mark.slow
def test_seed_determines_the_losses(tmp_path, data):
    """The seed also determines the ITG head, hard negatives and data order."""
    torch.manual_seed(0)
    folder = folder_of(tmp_path / "model", blip2("blip2-stage1"))
    losses = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(number)
        call("blip2-stage1", folder, data, out, *STAGE1, "--max-steps", "1", "--seed", seed)
        losses.append((out / "losses.jsonl").read_text())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_two_processes_match_one_with_text_only_batches(tmp_path, data, model):
    content = json.loads(data[0].read_text())
    for record in content[::2]:
        del record["image"]
        said = record["conversations"][0]
        said["value"] = said["value"].replace("<image>", "").strip()
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps(content))
    more = ("--batch", "4", "--lr", "5e-3", "--workers", "0", "--format", "v1")
    alone, two = tmp_path / "alone", tmp_path / "two"
    call("llava-stage1", model, (mixed, data[1]), alone, *more, "--device-batch", "1")
    launched = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes",
            "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", "0", "-m", "vlm_fast.cli.main",
            *arguments("llava-stage1", model, (mixed, data[1]), two, *more, "--device-batch", "1"),
        ],
        env=os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert launched.stderr.count("the model is in") == 1  # only one process prints
    ours, theirs, before = weights(two), weights(alone), weights(model)
    name = "multi_modal_projector.linear_1.weight"
    assert not torch.allclose(ours[name], before[name])
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], msg=name)
