"""Valid images that a processor refuses: reported by the check, raised or replaced in training."""

import json
import pickle

import pytest
from PIL import Image
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from tests.support import tiny_processors
from tests.support.processors_of_models import PROCESSORS
from vlm_fast.cli import main
from vlm_fast.training.data import (
    BadRecord,
    Captions,
    Collator,
    Conversations,
    Example,
    ReplacedRecordWarning,
    Turn,
    check,
)
from vlm_fast.training.recipes.captions import CaptionCollator

SIZES = {
    "good": (40, 30),
    "thin": (1500, 7),
    "other": (30, 40),
    "flat": (7, 1501),
    "last": (28, 28),
}
WORDS = r"refused by the processor: .*got '{}\.png': ValueError: .*aspect ratio.*200"


@pytest.fixture
def data(tmp_path):
    """Records with valid images; Qwen's processor refuses the thin ones."""
    records = []
    for name, size in SIZES.items():
        Image.new("RGB", size, "orange").save(tmp_path / f"{name}.png")
        said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": name}]
        records.append({"id": name, "image": f"{name}.png", "conversations": said})
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json", tmp_path


@pytest.fixture
def processor():
    return PROCESSORS["Qwen2VL"]()


def answers(processor, batch):
    tokens = processor.tokenizer
    return [
        tokens.decode(ids[labels != -100]).strip().removesuffix("</s>").strip()
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


def test_check_names_each_refused_image(data, processor):
    collate = Collator(processor, format="v1")
    found = check(*data, collate=collate)
    assert [(issue.index, issue.id, issue.field, issue.kind) for issue in found.issues] == [
        (1, "thin", "image", "refused by the processor"),
        (3, "flat", "image", "refused by the processor"),
    ]
    assert found.good == 3 and "'thin.png': ValueError: " in found.issues[0].actual
    with pytest.raises(BadRecord, match=r"record 1 \(id 'thin'\), image: " + WORDS.format("thin")):
        check(*data, collate=collate, on_bad="stop")


def test_command_names_each_refused_image(data, processor, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda folder: processor)
    arguments = ["data", "check", "--data", data[0], "--images", data[1], "--processor", data[1]]
    command = [str(word) for word in (*arguments, "--format", "v1")]
    found = CliRunner().invoke(main.app, [*command, "--json"])
    assert found.exit_code == main.Exit.FAILURE, found.output
    content = json.loads(found.stdout)
    assert content["counts"] == {"refused by the processor": 2} and content["good"] == 3
    text = CliRunner().invoke(main.app, command).stdout
    assert "record 1 (id 'thin'), image: refused by the processor: " in text
    assert "'flat.png': ValueError: " in text


def test_refused_image_stops_training(data, processor):
    loader = DataLoader(
        Conversations(*data), batch_size=2, collate_fn=Collator(processor, format="v1")
    )
    with pytest.raises(BadRecord, match=r"record 1 \(id 'thin'\), image: " + WORDS.format("thin")):
        list(loader)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_refused_image_is_replaced_by_the_next_good_record(data, processor, size, workers):
    examples = Conversations(*data, on_bad="skip")
    loader = DataLoader(
        examples, batch_size=size, collate_fn=Collator(processor, format="v1"), num_workers=workers
    )
    if workers:
        found = list(loader)
    else:
        with pytest.warns(
            ReplacedRecordWarning, match=r"record 1 \(id 'thin'\), image: refused by"
        ):
            found = list(loader)
    learned = [answer for batch in found for answer in answers(processor, batch)]
    assert learned == ["good", "other", "other", "last", "last"]
    assert examples.replaced == 2


def test_replacement_wraps_around_and_raises_if_none_is_good(data, processor):
    records = json.loads(data[0].read_text())
    collate = Collator(processor, format="v1")
    data[0].write_text(json.dumps([records[0], records[1]]))
    with pytest.warns(ReplacedRecordWarning):
        batch = collate([Conversations(*data, on_bad="skip")[1]])
    assert answers(processor, batch) == ["good"]
    data[0].write_text(json.dumps([records[1], records[3]]))
    with pytest.warns(ReplacedRecordWarning), pytest.raises(BadRecord, match="refused by the proc"):
        collate([Conversations(*data, on_bad="skip")[0]])


def test_too_long_example_is_replaced(data):
    records = json.loads(data[0].read_text())
    records[0]["conversations"][0]["value"] = "<image>" + "Why? " * 200
    data[0].write_text(json.dumps(records))
    processor = tiny_processors.llava()
    loader = DataLoader(
        Conversations(*data, on_bad="skip"), batch_size=2,
        collate_fn=Collator(processor, max_length=220),
    )  # fmt: skip
    with pytest.warns(
        ReplacedRecordWarning, match=r"record 0 \(id 'good'\), conversations: too long"
    ):
        batch = next(iter(loader))
    assert answers(processor, batch) == ["thin", "thin"]


def test_conversation_refused_by_template_raises(data):
    told = "messages[0]['content'][1]['text'] == 'No'"
    refusing = f"{{% if {told} %}}{{{{ raise_exception('not so') }}}}{{% endif %}}"
    processor = tiny_processors.llava(chat_template=refusing + tiny_processors.CHAT)
    turns = (Turn("human", "<image>No"), Turn("gpt", "a"))
    refused = Example("x", Image.new("RGB", (30, 30)), turns, 7, "x.png")
    with pytest.raises(BadRecord, match=r"record 7 \(id 'x'\), image: refused .*x\.png.*not so"):
        Collator(processor)([refused])


def test_refused_image_in_captions_is_replaced(data):
    class Thin(Exception):
        pass

    processor = tiny_processors.blip2()
    real = processor.image_processor.preprocess

    def preprocess(images, **options):
        if any(max(image.size) > 1000 for image in images):
            raise Thin("too thin for me")
        return real(images, **options)

    processor.image_processor.preprocess = preprocess
    collate = CaptionCollator(processor)
    with pytest.raises(
        BadRecord, match=r"record 1 \(id 'thin'\), image: .*Thin: 'too thin for me'"
    ):
        list(DataLoader(Captions(*data), batch_size=2, collate_fn=collate))
    captions = Captions(*data, on_bad="skip")
    with pytest.warns(ReplacedRecordWarning):
        batches = list(DataLoader(captions, batch_size=5, collate_fn=collate))
    assert captions.replaced == 2 and batches[0]["pixel_values"].shape[0] == 5


def test_batch_level_error_is_raised(data):
    """Each example works alone, so no record is at fault and none is replaced."""
    examples = Conversations(*data, on_bad="skip")
    text_only = Example("t", None, (Turn("human", "Who?"), Turn("gpt", "me")))
    with pytest.raises(TypeError, match="makes other tokens of the text"):
        Collator(tiny_processors.blip2(), format="v1")([examples[0], text_only])
    assert examples.replaced == 0


def test_out_of_memory_is_raised(data, monkeypatch):
    processor = tiny_processors.llava()

    def full(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(type(processor), "__call__", full)
    with pytest.raises(MemoryError):
        Collator(processor)([Conversations(*data, on_bad="skip")[0]])


def test_pickled_example_excludes_its_dataset(data):
    one = Conversations(*data, on_bad="skip")[0]
    assert one.replacement is not None and one.file == "good.png" and one.index == 0
    sent = pickle.dumps(one)
    assert len(sent) < 2 * len(pickle.dumps(one.image)) + 2000
    assert pickle.loads(sent).replacement is None
