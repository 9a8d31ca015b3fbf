"""The collator: processor inputs, labels and image positions of conversations."""

import copy
import json
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from tests.support import photographs, tiny_llava, tiny_processors
from vlm_fast.cli import main
from vlm_fast.training.data import BadRecord, Collator, Conversations, Example, Turn

PICTURE = Image.new("RGB", (40, 30), "orange")


def example(*texts, image=PICTURE):
    turns = [Turn(("human", "gpt")[number % 2], text) for number, text in enumerate(texts)]
    return Example("an id", image, tuple(turns))


PICTURED = example("What is\n<image>", "a cat", "Of what colour?", "red")
TEXT_ONLY = example("Who is it?", "an astronaut", image=None)


def tokens(processor, batch, row=0):
    """The attended tokens of a row without image tokens, and whether each has a label."""
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    learned = batch["labels"][row, : len(ids)] != -100
    assert torch.equal(batch["labels"][row, : len(ids)][learned], ids[learned])
    assert (batch["labels"][row, len(ids) :] == -100).all()
    words = processor.tokenizer.convert_ids_to_tokens(ids.tolist())
    return [(w, bool(x)) for w, x in zip(words, learned, strict=True) if w != "<image>"]


def learned_text(processor, batch, row=0):
    return "".join(word.replace("▁", " ") for word, on in tokens(processor, batch, row) if on)


def test_v1_format_is_vicuna_with_the_image_first():
    processor = tiny_processors.llava()
    batch = Collator(processor)([PICTURED])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("<s>A chat between a curious user")
    assert text.endswith(
        f"questions. USER: {'<image>' * 16}\nWhat is ASSISTANT: a cat</s>"
        "USER: Of what colour? ASSISTANT: red</s>"
    )
    # The space before "a" is in its token; that before "red" is a token of its own.
    assert learned_text(processor, batch) == " a cat</s>red</s>"


def test_plain_format_is_image_and_caption():
    processor = tiny_processors.llava()
    batch = Collator(processor, format="plain")([PICTURED])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text == f"<s>{'<image>' * 16}a cat\n"
    assert learned_text(processor, batch) == "a cat\n"
    with pytest.raises(ValueError, match="plain format is of images"):
        Collator(processor, format="plain")([TEXT_ONLY])


@pytest.mark.parametrize("template", [tiny_processors.CHAT, tiny_processors.UNMARKED])
def test_chat_template_with_and_without_generation_marks(template):
    processor = tiny_processors.llava(chat_template=template)
    collator = Collator(processor)
    assert collator.format == "chat"
    batch = collator([PICTURED])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text == (
        f"<s>USER: {'<image>' * 16}\nWhat is ASSISTANT: a cat</s> "
        "USER: Of what colour? ASSISTANT: red</s> "
    )
    learned = learned_text(processor, batch)
    assert learned.replace(" ", "") == "acat</s>red</s>"


def test_template_that_rewrites_earlier_turns_needs_generation_marks():
    rewriting = "{{ messages | length }}" + tiny_processors.UNMARKED
    collator = Collator(tiny_processors.llava(chat_template=rewriting))
    with pytest.raises(ValueError, match=r"mark the answers.*generation"):
        collator([PICTURED])
    silent = tiny_processors.CHAT.replace("'assistant'", "'nobody'")
    with pytest.raises(ValueError, match="has no answer in"):
        Collator(tiny_processors.llava(chat_template=silent))([PICTURED])


@pytest.mark.parametrize("family", ["llava", "idefics"])
def test_image_between_answers(family):
    processor = getattr(tiny_processors, family)()
    batch = Collator(processor)([example("Who?", "a cat", "And here? <image>", "red")])
    assert learned_text(processor, batch) == " a cat</s>red</s>"


@pytest.mark.parametrize("vocabulary", [300, 500])
@pytest.mark.parametrize("template", [None, tiny_processors.CHAT, tiny_processors.UNMARKED])
def test_labels_are_exact_where_tokens_cross_answer_ends(vocabulary, template):
    """By characters: labelled tokens contain part of an answer, and the others do not."""
    words = tiny_processors.tokenizer(vocabulary, merging=True)
    processor = tiny_processors.llava(words, chat_template=template)
    across = 0
    for image, start in ((PICTURE, "<image>\n"), (None, "")):
        given = example(
            f"{start}Who is it?", "an astronaut", "What colour is the suit?", "orange", image=image
        )
        found = tokens(processor, Collator(processor)([given]))
        whole = "".join(word for word, _ in found)
        within = {
            whole.index(answer) + place
            for answer in ("an astronaut</s>", "orange</s>")
            for place in range(len(answer))
        }
        spaces = {place for place, letter in enumerate(whole) if letter == " "}
        at = 0
        for word, learned in found:
            covered = {*range(at, at + len(word))}
            if covered - spaces:
                assert learned == bool(covered & within - spaces), (word, at)
                across += learned and not covered <= within
            at += len(word)
    assert across, "no token reaches over an end: the test shows nothing"


def test_truncation_cuts_text_but_not_image_tokens():
    processor = tiny_processors.llava(chat_template=tiny_processors.CHAT)
    whole = Collator(processor)([PICTURED])
    first = int((whole["labels"][0] != -100).nonzero()[0])
    image_end = int((whole["input_ids"][0] == processor.image_token_id).nonzero()[-1]) + 1
    cut = Collator(processor, max_length=first + 1)([PICTURED, TEXT_ONLY])
    assert cut["labels"].shape == cut["input_ids"].shape == cut["attention_mask"].shape
    assert torch.equal(cut["labels"][0], whole["labels"][0, : first + 1])
    for length, words in ((first, "an answer that begins"), (image_end - 1, "an image that ends")):
        with pytest.raises(BadRecord, match=f"record 'an id', conversations: too long: .*{words}"):
            Collator(processor, max_length=length)([PICTURED])


def test_image_token_of_the_processor_in_text_is_refused():
    given = example("<image>\nRead <|image|> aloud", "no")
    with pytest.raises(BadRecord, match=r"<\|image\|> 1 times in the text, got 2"):
        Collator(tiny_processors.mllama(), format="v1")([given])


def test_invalid_arguments_raise():
    processor = tiny_processors.llava()
    with pytest.raises(TypeError, match=r"processor is a .*, expected one with"):
        Collator(copy.copy(processor.tokenizer))
    with pytest.raises(ValueError, match="format is 'v0', expected one of plain, v1, chat"):
        Collator(processor, format="v0")
    with pytest.raises(ValueError, match="no chat template"):
        Collator(processor, format="chat")
    with pytest.raises(ValueError, match="max_length is 0"):
        Collator(processor, max_length=0)
    with pytest.raises(ValueError, match="examples is empty"):
        Collator(processor)([])
    for token, words in (("pad", "no pad_token"), ("eos", "no eos_token")):
        lacking = copy.deepcopy(processor)
        setattr(lacking.tokenizer, f"{token}_token", None)
        with pytest.raises(ValueError, match=words):
            Collator(lacking)


def test_training_with_dataloader_workers(tmp_path):
    records, images = photographs.write(tmp_path, longest=32, views=("whole",))
    data = Conversations(records, images)
    collator = Collator(tiny_processors.llava(), format="plain")
    here = [collator([data[n] for n in (k, k + 1)]) for k in range(0, 12, 2)]
    # As DataLoader workers that are started by spawn need.
    sent, collate = pickle.loads(ForkingPickler.dumps((data, collator)))
    for loader in (
        DataLoader(data, batch_size=2, collate_fn=collator, num_workers=2),
        DataLoader(sent, batch_size=2, collate_fn=collate),
    ):
        for one, other in zip(here, loader, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
    model = tiny_llava.llava().train()
    loss = model(**here[0]).loss
    loss.backward()
    assert loss.isfinite() and model.model.multi_modal_projector.linear_1.weight.grad.norm() > 0


def test_check_finds_examples_too_long_for_the_processor(tmp_path):
    records, images = photographs.write(tmp_path, longest=32, views=("whole",))
    tiny_processors.llava().save_pretrained(tmp_path / "model")
    names = [one.id for one in Conversations(records, images)]
    command = ["data", "check", "--data", records, "--images", images, "--format", "plain"]
    command += ["--json", "--processor", tmp_path / "model"]

    def call(*more):
        return CliRunner().invoke(main.app, [str(word) for word in (*command, *more)])

    assert call("--max-length", 18).exit_code == 0
    found = call("--max-length", 17)  # one for the beginning, 16 for the image: no answer
    assert found.exit_code == main.Exit.FAILURE
    content = json.loads(found.stdout)
    assert content["counts"] == {"too long": len(names)} and content["good"] == 0
    assert [issue["id"] for issue in content["faults"]] == names
    for arguments, words in (
        (("--processor", tmp_path / "no"), "--processor: there is no folder"),
        (("--processor", images), "--processor: "),
        (("--format", "v0"), "'v0' is not one of 'plain', 'v1', 'chat'"),
    ):
        found = call(*arguments)
        assert found.exit_code == main.Exit.USAGE and words in found.stderr, found.output
    command = [*command[:6], "--max-length", 9]
    assert "--format and --max-length need --processor" in call().stderr
