"""The collator with the processors of all patched models, with and without images."""

import pytest
import torch
from PIL import Image

from tests.support.processors_of_models import PICTURED_ROWS, PROCESSORS, REFUSED
from vlm_fast.training.data import BadRecord, Collator, Example, Turn

WIDE, TALL = Image.new("RGB", (80, 30), "orange"), Image.new("RGB", (40, 60), "green")


def example(image, *texts):
    turns = tuple(Turn(("human", "gpt")[n % 2], text) for n, text in enumerate(texts))
    return Example("an id", image, turns)


def pictured(image):
    return example(image, "What is\n<image>", "a cat", "Of what colour?", "red")


TEXT_ONLY = example(None, "Who is it?", "an astronaut")


def learned(processor, batch):
    """The labelled text of each row, without spaces."""
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        kept = ids[labels != -100]
        assert torch.equal(labels[labels != -100], kept)
        tokens = processor.tokenizer.convert_ids_to_tokens(kept.tolist())
        yield "".join(tokens).replace("▁", "")


@pytest.mark.parametrize("name", PROCESSORS)
def test_rows_with_and_without_images(name):
    processor = PROCESSORS[name]()
    collator = Collator(processor, format="v1")
    rows = [pictured(WIDE), TEXT_ONLY, pictured(TALL)]
    batch = collator(rows)
    wanted = ["acat</s>red</s>", "anastronaut</s>", "acat</s>red</s>"]
    assert list(learned(processor, batch)) == wanted
    for row, one in enumerate(rows):
        single = collator([one])
        length = single["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, :length], single["input_ids"][0])
        assert torch.equal(batch["labels"][row, :length], single["labels"][0])
        assert not batch["attention_mask"][row, length:].any()


@pytest.mark.parametrize("name", PICTURED_ROWS)
def test_rows_that_all_have_images(name):
    processor = PICTURED_ROWS[name]()
    collator = Collator(processor, format="v1")
    batch = collator([pictured(WIDE), pictured(TALL)])
    assert list(learned(processor, batch)) == ["acat</s>red</s>"] * 2
    # A row without an image is refused, or equals the row made alone.
    try:
        mixed = collator([pictured(WIDE), TEXT_ONLY])
    except (ValueError, TypeError):
        return
    assert list(learned(processor, mixed)) == ["acat</s>red</s>", "anastronaut</s>"]


@pytest.mark.parametrize("name", {**PROCESSORS, **PICTURED_ROWS})
def test_per_token_tensors_are_truncated_with_the_tokens(name):
    processor = {**PROCESSORS, **PICTURED_ROWS}[name]()
    rows = [pictured(TALL), pictured(TALL)]
    whole = Collator(processor, format="v1")(rows)
    length = whole["input_ids"].shape[1]
    cut = Collator(processor, format="v1", max_length=length - 3)(rows)
    for key, value in whole.items():
        if value.ndim > 1 and value.shape[:2] == (2, length):
            assert torch.equal(cut[key], value[:, : length - 3]) or key == "labels", key


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_processor_is_refused_by_name(name):
    with pytest.raises(TypeError, match=rf"processor is a {name}Processor: "):
        Collator(REFUSED[name](), format="v1")


def test_paligemma_answer_attention_is_causal():
    batch = Collator(PICTURED_ROWS["PaliGemma"](), format="v1")([pictured(WIDE), pictured(TALL)])
    for types, labels, attended in zip(
        batch["token_type_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        first, count = int((labels != -100).nonzero()[0]), int(attended.sum())
        assert not types[:first].any() and types[first:count].all()


def test_row_refused_by_processor_is_named():
    with pytest.raises(BadRecord, match=r"record 'an id', .*refused by the processor.*images"):
        Collator(PICTURED_ROWS["PaliGemma"](), format="v1")([TEXT_ONLY])


@pytest.mark.parametrize("name", ["Gemma3", "Chameleon", "PaliGemma", "Emu3"])
def test_plain_format(name):
    processor = {**PROCESSORS, **PICTURED_ROWS}[name]()
    batch = Collator(processor, format="plain")([pictured(WIDE), pictured(TALL)])
    assert [text.strip() for text in learned(processor, batch)] == ["acat"] * 2


@pytest.mark.parametrize("name", ["Gemma3", "Chameleon", "Lfm2Vl", "Emu3"])
def test_subclass_of_an_unsupported_processor_is_refused(name):
    """The subclass has an unknown name."""
    processor = PROCESSORS[name]()
    processor.__class__ = type("MyProcessor", (type(processor),), {})
    batch = Collator(processor, format="v1")([pictured(WIDE), TEXT_ONLY, pictured(TALL)])
    wanted = ["acat</s>red</s>", "anastronaut</s>", "acat</s>red</s>"]
    assert list(learned(processor, batch)) == wanted
