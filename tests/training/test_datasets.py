"""Conversation data sets: bad records are reported, counted, skipped or raised."""

import copy
import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from tests.support import photographs
from vlm_fast.cli import main
from vlm_fast.training.data import (
    BadRecord,
    Captions,
    Conversations,
    ReplacedRecordWarning,
    check,
    datasets,
)
from vlm_fast.training.data.records import Records


def record(*texts, id="a", image=None):
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"id": id, "conversations": said} | ({"image": image} if image else {})


GOOD = record("Who?", "an astronaut")
PICTURED = record("<image>\nWho?", "an astronaut", image="0.png")
HUMAN, GPT = GOOD["conversations"]


def said(*turns):
    return {"id": "a", "conversations": list(turns)}


# Record, kind of fault, and the words for position, expectation and finding.
BAD = {
    "a string": ("oops", "wrong type", "record 1, record: .*expected an object, got 'oops'"),
    "no id": ({"conversations": []}, "missing key", "record 1, id: .*got keys 'conversations'"),
    "no conversations": (
        {"id": 7}, "missing key", r"record 1 \(id '7'\), conversations: .*got keys 'id'",
    ),
    "an id that is true": (GOOD | {"id": True}, "wrong type", "id: .*whole number, got True"),
    "two images": (PICTURED | {"image": ["0.png"]}, "wrong type", "image: .*got a list of 1"),
    "turns by name": (GOOD | {"conversations": {}}, "wrong type", "list of turns, got an object"),
    "no turns": (said(), "empty conversation", "conversations: .*got a list of 0"),
    "a turn that is text": (said("hello"), "wrong type", r"conversations\[0\]: .*got 'hello'"),
    "no value": (said({"from": "human"}), "missing key", r"\[0\]\.value: .*got keys 'from'"),
    "no from": (said({"value": "x"}), "missing key", r"\[0\]\.from: .*got keys 'value'"),
    "null as text": (said(HUMAN, GPT | {"value": None}), "wrong type", r"\[1\]\.value: .*null"),
    "half a letter": (said(HUMAN, GPT | {"value": "\ud800"}), "not Unicode", r"\[1\]\.value"),
    "a stranger": (said(HUMAN | {"from": "user"}, GPT), "unknown role", "'gpt', got 'user'"),
    "two questions": (said(HUMAN, HUMAN), "roles", r"\[1\]\.from: .*expected 'gpt'.*got 'human'"),
    "the answer first": (said(GPT, HUMAN), "roles", r"\[0\]\.from: .*expected 'human'"),
    "no last answer": (said(HUMAN, GPT, HUMAN), "roles", "an answer to the last question"),
    "an empty answer": (record("Who?", " \n"), "empty answer", r"\[1\]\.value: .*text, got"),
    "an empty question": (record("", "me"), "empty question", r"\[0\]\.value"),
    "no <image>": (record("Who?", "me", image="0.png"), "image count", "1 <image>.*got 0"),
    "<image> twice": (
        record("<image><image>", "me", image="0.png"), "image count", "1 <image>.*got 2",
    ),
    "<image> of none": (record("<image>", "me"), "image count", "0 <image>, with no image, got 1"),
    "<image> in an answer": (
        record("Who?", "<image>", image="0.png"), "image count", r"\[1\]\.value: .*got 1",
    ),
    "up": (PICTURED | {"image": "../0.png"}, "path", "got '../0.png', which leads upwards"),
    "up in the middle": (PICTURED | {"image": "a\\..\\..\\0.png"}, "path", "leads upwards"),
    "absolute": (PICTURED | {"image": "/etc/passwd"}, "path", "'/etc/passwd', which is absolute"),
    "another drive": (PICTURED | {"image": "C:0.png"}, "path", "which is absolute"),
    "not a name": (PICTURED | {"image": "a\0.png"}, "path", "no name of a file"),
}  # fmt: skip
# These have the right structure, but a bad image.
BAD_PICTURES = {
    "missing": ("nowhere.png", "missing image", "a file in .*got 'nowhere.png', no such file"),
    "a folder": ("folder", "missing image", "got 'folder', a folder"),
    "truncated": ("truncated.jpg", "unreadable image", "got 'truncated.jpg': OSError: .*truncated"),
    "text": ("text.png", "unreadable image", "UnidentifiedImageError"),
    "broken within": ("broken.png", "unreadable image", "got 'broken.png': "),
}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "folder").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    photographs.photograph("coffee.png").resize((64, 64)).save(folder / "whole.jpg")
    content = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("this is no picture")
    content = bytearray((folder / "1.png").read_bytes())
    content[content.index(b"IDAT") + 6] ^= 255
    (folder / "broken.png").write_bytes(content)
    return folder


def written(folder, *records, lines=False):
    path = folder / ("data.jsonl" if lines else "data.json")
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return path


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_record_raises_or_is_skipped(tmp_path, images, name, lines):
    bad, kind, words = BAD[name]
    path = written(tmp_path, GOOD, bad, PICTURED | {"id": "b"}, lines=lines)
    with pytest.raises(BadRecord, match=words) as stopped:
        Conversations(path, images)
    data = Conversations(path, images, on_bad="skip")
    assert [one.id for one in data] == ["a", "b"] and data.records.total == 3
    assert [issue.kind for issue in data.issues] == [kind]
    assert data.issues == [stopped.value.issue] and data.issues[0].index == 1


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_image_is_found_by_check_and_in_training(tmp_path, images, name):
    image, kind, words = BAD_PICTURES[name]
    bad = record("<image>", "me", id="bad", image=image)
    path = written(tmp_path, GOOD, bad, PICTURED | {"id": "b"})
    words = rf"record 1 \(id 'bad'\), image: {kind}: .*{words}"
    with pytest.raises(BadRecord, match=words):
        check(path, images, on_bad="stop")
    found = check(path, images)
    assert (found.total, found.good) == (3, 2)
    assert [issue.kind for issue in found.issues] == [kind]
    stopping, skipping = (Conversations(path, images, on_bad=how) for how in ("stop", "skip"))
    with pytest.raises(BadRecord, match=words):
        stopping[1]
    with pytest.warns(ReplacedRecordWarning, match=words):
        assert skipping[1].id == "b"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns once
        assert [one.id for one in skipping] == ["a", "b", "b"]
    assert skipping.replaced == 1


TORN = {
    "an object": ('{"id": 1}', "top level: .*expected a list, got an object of 1"),
    "a number": ("7", "expected a list, got 7"),
    "empty": ("", "not JSON: .*got Expecting value: line 1 column 1"),
    "torn": (json.dumps([GOOD, GOOD])[:-20], "not JSON: "),
    "not closed": (json.dumps([GOOD])[:-1], "not JSON: .*delimiter"),
    "a comma too much": (json.dumps([GOOD])[:-1] + ",]", "not JSON: "),
    "two lists": ("[] []", "not JSON: .*Extra data"),
    "nested": ("[" * 100_000, "not JSON: .*nested too deeply"),
}


@pytest.mark.parametrize("name", TORN)
def test_file_that_is_not_a_json_list_raises(tmp_path, images, name):
    content, words = TORN[name]
    path = tmp_path / "data.json"
    path.write_text(content)
    for how in ("stop", "skip"):
        with pytest.raises(BadRecord, match=f"^the file, top level: .*{words}"):
            Records(path, on_bad=how)


def test_invalid_utf8_raises(tmp_path):
    (tmp_path / "data.json").write_bytes(b'["\xff"]')
    with pytest.raises(BadRecord, match=r"JSON in UTF-8, got .*0xff"):
        Records(tmp_path / "data.json", on_bad="skip")
    lines = tmp_path / "data.jsonl"
    lines.write_bytes(b'\xff\n{"id": \n\n' + json.dumps(GOOD).encode())
    data = Records(lines, on_bad="skip")
    assert [issue.index for issue in data.issues] == [0, 1] and data[0].index == 2


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_records_are_read_by_byte_offset(tmp_path, lines, ascii_only, mark):
    records = [record("¿Qué? 🐈", f"né {n} 猫", id=f"é{n}") for n in range(5)]
    dump = [json.dumps(one, ensure_ascii=ascii_only) for one in records]
    text = "\n".join(dump) if lines else " [\n" + " , ".join(dump) + "\n] \n"
    path = tmp_path / ("data.jsonl" if lines else "data.json")
    path.write_bytes(mark + text.encode())
    read = Records(path)
    assert [read[n].id for n in range(5)] == [one["id"] for one in records]
    assert read[4].turns[1].text == "né 4 猫"


def test_no_good_record_or_missing_folder_raises(tmp_path, images):
    path = written(tmp_path, "oops")
    with pytest.raises(ValueError, match="no good record among 1"):
        Conversations(path, images, on_bad="skip")
    path = written(tmp_path, GOOD)
    with pytest.raises(ValueError, match=r"images is .*expected a folder"):
        Conversations(path, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no good record"):
        Captions(path, images)
    with pytest.raises(ValueError, match="on_bad is 'ignore', expected 'stop' or 'skip'"):
        Conversations(path, images, on_bad="ignore")
    with pytest.raises(FileNotFoundError):
        Conversations(tmp_path / "nowhere.json", images)


def test_captions_are_first_answers_of_records_with_image(tmp_path):
    records, images = photographs.write(tmp_path, longest=16, views=("whole",))
    content = json.loads(records.read_text())
    records.write_text(json.dumps([GOOD | {"id": "text"}, *content]))
    data = Captions(records, images)
    assert [one.text for one in data] == [
        caption for caption, _ in photographs.PHOTOGRAPHS.values()
    ]
    assert {one.image.mode for one in data} == {"RGB"}
    assert len(Conversations(records, images)) == len(data) + 1


def test_duplicate_id_warns(tmp_path, images):
    path = written(tmp_path, GOOD, PICTURED, GOOD | {"id": "c"})
    data = Conversations(path, images)
    assert len(data) == 3
    assert [str(issue) for issue in data.issues] == [
        "record 1 (id 'a'), id: duplicate id: expected an id of its own, got that of record 0"
    ]


def test_image_deleted_during_training_stops_or_is_replaced(tmp_path, images):
    path = written(tmp_path, *(PICTURED | {"id": str(n), "image": f"{n}.png"} for n in range(3)))
    stopping, data = Conversations(path, images), Conversations(path, images, on_bad="skip")
    (images / "1.png").unlink()
    # Also in workers: errors keep type and message, and replacements are counted here.
    with pytest.raises(BadRecord, match=r"record 1 \(id '1'\), image: missing image"):
        list(DataLoader(stopping, batch_size=None, num_workers=1))
    loader = DataLoader(data, batch_size=None, num_workers=2, collate_fn=lambda one: one.id)
    assert list(loader) == ["0", "2", "2"] and data.replaced == 1
    shutil.rmtree(images)
    with pytest.warns(ReplacedRecordWarning), pytest.raises(BadRecord, match="record 1"):
        data[2]
    assert data.replaced == 3


def test_file_may_be_replaced_but_not_modified(tmp_path, images):
    path = written(tmp_path, GOOD, PICTURED)
    data = Conversations(path, images)
    sent = pickle.dumps(data)
    assert [one.id for one in pickle.loads(sent)] == [one.id for one in copy.deepcopy(data)]
    other = written(images, *[record("New?", "no")] * 3)
    other.replace(path)
    assert data[1].turns[1].text == "an astronaut"
    with pytest.raises(RuntimeError, match=r"data\.json has changed since it was read"):
        pickle.loads(sent)
    data = Conversations(path, images)
    path.write_text("[]")
    with pytest.raises(RuntimeError, match=r"data\.json has changed since it was read"):
        data[1]


def test_check_decodes_each_image_once(tmp_path, images, monkeypatch):
    path = written(tmp_path, *(PICTURED | {"id": str(n)} for n in range(5)))
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or real(file))
    monkeypatch.setattr(datasets, "CHECKED_AT_ONCE", 2)
    assert check(path, images).good == 5
    assert opened == [images / "0.png"]
    # A bad image that several records share is a fault of each.
    (images / "0.png").unlink()
    issues = check(path, images).issues
    assert [(issue.index, issue.id) for issue in issues] == [(n, str(n)) for n in range(5)]
    read = Records(path)
    monkeypatch.setattr(Path, "read_bytes", None)
    monkeypatch.setattr(Path, "open", None)
    assert len(Conversations(read, images)) == len(Captions(read, images)) == 5


def call(*arguments):
    return CliRunner().invoke(main.app, ["data", "check", *map(str, arguments)])


def test_command_prints_and_counts_bad_records(tmp_path, images):
    bad = [content for content, _, _ in BAD.values()]
    bad += [record("<image>", "x", image=image, id=image) for image, *_ in BAD_PICTURES.values()]
    many = [PICTURED | {"id": str(n), "image": "nowhere.png"} for n in range(30)]
    path = written(tmp_path, GOOD, *bad, GOOD, *many)
    found = call("--data", path, "--images", images, "--json")
    assert found.exit_code == main.Exit.FAILURE, found.output
    content = json.loads(found.stdout)
    assert content["total"] == 2 + len(bad) + 30 and content["good"] == 2 and not content["ok"]
    assert content["counts"]["missing image"] == 32 and content["counts"]["duplicate id"] == 1
    assert sum(content["counts"].values()) == len(content["faults"]) == len(bad) + 31
    text = call("--data", path, "--images", images)
    assert text.exit_code == main.Exit.FAILURE
    assert (
        text.stdout.count("missing image: ") == 20 and "and 12 more of missing image" in text.stdout
    )
    assert "warning: record 33 (id 'a'), id: duplicate id" in text.stdout
    lines = [line.split() for line in text.stdout.splitlines()]
    assert ["good", "records", "2"] in lines and ["missing", "image", "32"] in lines
    stopped = call("--data", path, "--images", images, "--on-bad", "stop")
    assert stopped.exit_code == main.Exit.FAILURE and stopped.stdout.count("record 1") == 1
    assert "stopped at the first bad record" in stopped.stdout


def test_unreadable_file_is_a_usage_error(tmp_path, images, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    path = written(tmp_path, GOOD)
    monkeypatch.setattr(Path, "read_bytes", refused)
    found = call("--data", path, "--images", images)
    assert found.exit_code == main.Exit.USAGE and "Permission denied" in found.stderr
    options = (x for name in ("captions", "boxes") for x in (f"--{name}", str(path)))
    command = ["data", "generate", *options, "--images", str(images), "--model", "m"]
    found = CliRunner().invoke(main.app, [*command, "--out", str(tmp_path / "out.json")])
    assert found.exit_code == main.Exit.USAGE and "Permission denied" in found.stderr


def test_command_passes_good_data_and_refuses_missing_file(tmp_path, images):
    path = written(tmp_path, GOOD, PICTURED)  # duplicate ids: a warning is not a failure
    found = call("--data", path, "--images", images, "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)["ok"]
    for arguments, words in (
        (("--data", tmp_path / "no.json", "--images", images), "--data: there is no file"),
        (("--data", path, "--images", tmp_path / "no"), "--images: there is no folder"),
        (("--data", path, "--images", images, "--on-bad", "ignore"), "'stop', 'skip'"),
    ):
        found = call(*arguments)
        assert found.exit_code == main.Exit.USAGE and words in found.stderr
