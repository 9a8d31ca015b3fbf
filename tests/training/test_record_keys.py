"""Records with additional keys: a fault, a warning, or ignored metadata."""

import json

import pytest
from PIL import Image

from vlm_fast.training.data import BadRecord, Captions, Conversations, UnusedKeyWarning, check

QUESTION, ANSWER = {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "me"}
TEXT = {"id": "a", "conversations": [QUESTION, ANSWER]}
PICTURED = {
    "id": "b",
    "image": "coco/0.png",
    "conversations": [{"from": "human", "value": "<image>\nWho?"}, ANSWER],
}
CONTENT = {
    "video": "a.mp4", "videos": ["a.mp4"], "video_path": "a", "videoUrl": "http://x/a",
    "images": ["1.png", "2.png"], "image_2": "2.png", "image_list": ["1"], "frames": ["1", "2"],
    "audio": "a.wav", "audios": ["a"], "sound": "a", "speech_file": "a", "Voice": {"bytes": "UklG"},
    "point_cloud": "a", "depth_map": "a", "mask": [[0, 1]], "pdf": "a", "pixel_values": [[0.5]],
    "system": "Be brief.", "system_prompt": "Be brief.", "SystemMessage": "Be brief.",
    "tools": [{"name": "search"}], "weight": 0, "loss": False,
    "clip_of": "a.MP4", "extra": {"files": ["a.flac"]}, "attachment": "data:image/png;base64,iVBO",
}  # fmt: skip
METADATA = {
    "model": "gpt-4", "source": "coco", "task": "vqa", "dataset": "mix", "data_source": "llava",
    "split": "train", "type": "detail", "category": "animals", "language": "en", "score": 0.5,
    "license": "CC-BY", "width": 640, "height": 480, "question_id": "q7", "imageId": "7",
    "timestamp": "2024-01-01", "metadata": {"round": 2}, "valid": True, "num_turns": 3,
    "video": None, "images": [], "system": "", "audio": {}, "weight": 1, "frames": 16,
}  # fmt: skip
TOKENS = ("<video>", "<audio>", "<Video>", "<video_1>", "<|video_pad|>", "<|AUDIO|>", "<speech>",
          "<image_1>", "<|image_2|>", "<|image_pad|>", "<IMG_CONTEXT>", "<image_soft_token>",
          "<ImageHere>")  # fmt: skip


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images" / "coco").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "coco" / "0.png")
    return tmp_path / "images"


def written(folder, *records):
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("base", [TEXT, PICTURED], ids=["text", "pictured"])
@pytest.mark.parametrize("key", CONTENT)
def test_unsupported_content_key_is_a_fault(tmp_path, images, base, key):
    path = written(tmp_path, TEXT, {**base, "id": "bad", key: CONTENT[key]}, PICTURED)
    words = rf"record 1 \(id 'bad'\), {key}: other content: expected nothing"
    with pytest.raises(BadRecord, match=words):
        Conversations(path, images)
    data = Conversations(path, images, on_bad="skip")
    assert [one.id for one in data] == ["a", "b"]
    found = check(path, images)
    assert [issue.field for issue in found.issues if not issue.is_warning] == [key]
    assert (found.total, found.good) == (3, 2)


@pytest.mark.parametrize("key", ["video", "image", "system", "loss_weight"])
def test_unsupported_content_key_of_a_turn_is_a_fault(tmp_path, images, key):
    value = 0.5 if key == "loss_weight" else "a"
    bad = {**TEXT, "conversations": [QUESTION, {**ANSWER, key: value}]}
    with pytest.raises(BadRecord, match=rf"conversations\[1\]\.{key}: other content"):
        Conversations(written(tmp_path, bad), images)


@pytest.mark.parametrize("token", TOKENS)
def test_placeholders_of_other_media_are_faults(tmp_path, images, token):
    asked = {**TEXT, "conversations": [{**QUESTION, "value": f"{token}\nWho?"}, ANSWER]}
    said = {**TEXT, "conversations": [QUESTION, {**ANSWER, "value": f"me {token}"}]}
    for bad, number in ((asked, 0), (said, 1)):
        path = written(tmp_path, PICTURED, bad)
        with pytest.raises(BadRecord, match=rf"conversations\[{number}\]\.value: other content"):
            Conversations(path, images)
        assert [issue.actual for issue in check(path, images).issues] == [repr(token)]


def test_words_in_angle_brackets_are_not_placeholders(tmp_path, images):
    words = "Use <b>, <video controls>, </video>, <img>, a<b>c and <point x=1> here."
    good = {**TEXT, "conversations": [{**QUESTION, "value": words}, ANSWER]}
    assert check(written(tmp_path, good), images).issues == []


@pytest.mark.parametrize("key", METADATA)
def test_metadata_and_empty_keys_are_ignored(tmp_path, images, key):
    path = written(tmp_path, *({**one, key: METADATA[key]} for one in (TEXT, PICTURED)))
    assert check(path, images) == check(written(tmp_path, TEXT, PICTURED), images)
    assert len(Conversations(written(tmp_path, {**TEXT, key: METADATA[key]}), images)) == 1


def test_image_key_aliases_are_accepted(tmp_path, images):
    same = {"image_url": "http://cocodataset.org/train/0.png", "url": "http://x/9.jpg",
            "file_name": "0.png", "image_path": "/data/coco/0.png"}  # fmt: skip
    assert check(written(tmp_path, {**PICTURED, **same}), images).issues == []
    for key, value in same.items():  # without an image the key is a fault
        with pytest.raises(BadRecord, match=rf"{key}: other content"):
            Conversations(written(tmp_path, {**TEXT, key: value}), images)


def test_unknown_key_warns_once_and_the_record_is_used(tmp_path, images):
    records = [{**TEXT, "id": str(n), "rationale": f"since {n}"} for n in range(1, 4)]
    records[2]["conversations"] = [QUESTION, {**ANSWER, "thought": ["long"]}]
    path = written(tmp_path, TEXT, *records)
    with pytest.warns(
        UnusedKeyWarning, match=r"record 1 \(id '1'\), rationale: .*; 3 records have it"
    ):
        data = Conversations(path, images)
    assert len(data) == 4
    found = check(path, images)
    assert found.good == 4 and all(issue.is_warning for issue in found.issues)
    assert [(issue.kind, issue.field) for issue in found.issues] == [
        ("unknown key", "rationale"), ("unknown key", "conversations[].thought"),
    ]  # fmt: skip
    with pytest.warns(UnusedKeyWarning, match="caption: unknown key"):
        Captions(written(tmp_path, {**PICTURED, "caption": "a dog"}), images)
