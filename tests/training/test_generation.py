"""Parts of instruction data generation: annotations, answers, resume log, rate limit."""

import json
import re
from dataclasses import replace

import pytest

from tests.support.coco_annotations import BOXES, CAPTIONS
from vlm_fast.training.data import BadRecord
from vlm_fast.training.data.generation import Box, RateLimit, Scene, read_scenes
from vlm_fast.training.data.generation.answers import BadAnswer, parse_answer
from vlm_fast.training.data.generation.prompts import EXAMPLE, messages
from vlm_fast.training.data.generation.resume_log import ResumeLog


def written(folder, boxes=BOXES):
    paths = folder / "captions.json", folder / "instances.json"
    for path, content in zip(paths, (CAPTIONS, boxes), strict=True):
        path.write_text(json.dumps(content))
    return paths


def test_scenes_have_boxes_relative_to_image_size(tmp_path):
    assert read_scenes(*written(tmp_path)) == [
        Scene(
            7, "7.png", ("A dog on a chair.", "A chair."),
            (Box("dog", 0.25, 0.25, 0.75, 0.755), Box("chair", 0.0, 0.0, 1.0, 0.99)),
        ),
        Scene(8, "8.png", ("A cat.",), ()),
    ]  # fmt: skip


ANNOTATIONS = {
    "not JSON": ("{", "captions.json: not JSON"),
    "a list": ([], "captions.json: images: annotation: expected a list, got a list of 0"),
    "no images": ({"annotations": []}, "images: annotation: expected a list, got null"),
    "an image": ({"images": [3]}, r"images\[0\]: annotation: expected an object, got 3"),
    "no name": ({"images": [{"id": 7}]}, r"images\[0\].file_name: .* a file's name"),
    "upwards": (
        {"images": [{**CAPTIONS["images"][0], "file_name": "../7.png"}]}, "which leads upwards",
    ),
    "no width": (
        {"images": [{**CAPTIONS["images"][0], "width": 0}]}, r"images\[0\].width: .* a positive",
    ),
    "another image": (
        {**CAPTIONS, "annotations": [{"image_id": 3, "caption": "x"}]},
        r"annotations\[0\].image_id: annotation: expected the id of one of the images, got 3",
    ),
    "no caption": (
        {**CAPTIONS, "annotations": [{"image_id": 7, "caption": " "}]}, r"annotations\[0\].caption",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_annotations_of_wrong_structure_raise(tmp_path, name):
    content, words = ANNOTATIONS[name]
    paths = written(tmp_path)
    paths[0].write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(BadRecord, match=words):
        read_scenes(*paths)


@pytest.mark.parametrize(
    "change, words",
    [({"category_id": 5}, r"annotations\[0\].category_id: .* one of the categories, got 5"),
     ({"bbox": [1, 2, 3]}, r"annotations\[0\].bbox: .* width, height, got '\[1, 2, 3\]'"),
     ({"bbox": [1, 2, 3, "4"]}, r"annotations\[0\].bbox: "),
     ({"image_id": "7"}, r"annotations\[0\].image_id: .* a whole number, got '7'")],
)  # fmt: skip
def test_boxes_of_wrong_structure_raise(tmp_path, change, words):
    one = {**BOXES["annotations"][0], **change}
    with pytest.raises(BadRecord, match=rf"^the file, instances.json: {words}"):
        read_scenes(*written(tmp_path, {**BOXES, "annotations": [one]}))


BAD = {
    "no JSON": ("I would rather not", "expected JSON, got 'I would rather not'"),
    "no list": ('{"question": "x", "answer": "y"}', "expected a list of 1, got an object of 2"),
    "two": (json.dumps([{"question": "x", "answer": "y"}] * 2), "expected a list of 1"),
    "no answer": ('[{"question": "x"}]', "[0].answer: expected text, got null"),
    "an empty one": ('[{"question": "x", "answer": " "}]', "[0].answer: expected text, got ' '"),
    "text in it": ('["x"]', "[0]: expected an object, got 'x'"),
    "a placeholder": ('[{"question": "x", "answer": "<image>"}]', "expected no <image> in"),
    "half a letter": ('[{"question": "x", "answer": "\\ud800"}]', "text that UTF-8 can hold"),
    "nested": ("[" * 100_000, "expected JSON, got '[[["),
    "nothing": (" ", "expected text, got nothing"),
}


@pytest.mark.parametrize("name", BAD)
def test_parse_answer_refuses_bad_answers(name):
    text, words = BAD[name]
    with pytest.raises(BadAnswer, match=re.escape(words)):
        parse_answer(EXAMPLE, "reasoning", text)
    for few in ("[]", '[{"question": "x", "answer": "y"}]'):
        with pytest.raises(BadAnswer, match="expected a list of 2 to 10"):
            parse_answer(EXAMPLE, "conversation", few)


def test_parse_answer_returns_records():
    for text in (
        '[{"question": "x", "answer": "y"}]',
        '```json\n[{"question": "x ", "answer": "y"}]\n```',
    ):
        said = parse_answer(EXAMPLE, "reasoning", text)["conversations"]
        assert said[0]["value"] in ("x\n<image>", "<image>\nx") and said[1]["value"] == "y"
    scenes = [replace(EXAMPLE, id=number) for number in range(50)]
    first = [
        parse_answer(scene, "detail", "A dog.")["conversations"][0]["value"] for scene in scenes
    ]
    assert first == [
        parse_answer(s, "detail", "A cat.")["conversations"][0]["value"] for s in scenes
    ]
    assert len(set(first)) > 10  # all questions, with the image before and after


def test_resume_log_of_another_run_is_not_overwritten(tmp_path):
    path, log_header = tmp_path / "out.json.resume.jsonl", {"model": "m"}
    with ResumeLog(path, log_header) as ours:
        ours.add("7-detail", failed="no")
        with pytest.raises(ValueError, match="another process is writing"):
            ResumeLog(path, log_header)
    content = path.read_bytes()
    head, entry = content.splitlines()
    broken = b"\n".join([head, b"{", entry, b""])
    for wrong, model, words in (
        (content, "other", "is a resume log of model 'm', expected one of model 'other'"),
        (b"hello\n", "m", "is no resume log in line 1"),
        (b"hello", "m", "is no resume log"),
        (b'{"a": 1}\n', "m", "is no resume log, expected one of model 'm'"),
        (broken, "m", "is no resume log in line 2"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=re.escape(words)):
            ResumeLog(path, {"model": model})
        assert path.read_bytes() == wrong
    # A torn first line means that the run had sent nothing.
    path.write_bytes(head[:10])
    with ResumeLog(path, log_header) as again:
        assert not again.entries
    # Wherever the last line is torn, the others are read and the next one is complete.
    for length in range(len(head) + 1, len(content)):
        path.write_bytes(content[:length])
        with ResumeLog(path, log_header) as torn:
            assert not torn.entries
            torn.add("8-detail", failed="no")
        with ResumeLog(path, log_header) as read:
            assert list(read.entries) == ["8-detail"]


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds


@pytest.mark.parametrize("rate", [60, 7, 120, 0.5])
def test_rate_limiter_allows_at_most_rate_per_minute(rate):
    clock = Clock()
    limit = RateLimit(rate, clock=clock, sleep=clock.sleep)
    times = []
    for number in range(300):
        clock.now += 13.7 if number % 50 == 49 else 0.01  # work and a long pause
        limit.wait()
        times.append(clock.now)
    for start in times:
        assert sum(start <= at < start + 60 for at in times) <= rate + 1
    # It does not wait longer than needed.
    assert times[-1] - times[0] <= 300 * 60 / rate + 300 * 0.01 + 6 * 13.7


def test_rate_limiter_spaces_calls_evenly():
    clock = Clock()
    limit = RateLimit(6, clock=clock, sleep=clock.sleep)
    limit.wait()
    assert clock.now == 100.0
    limit.wait()
    assert clock.now == pytest.approx(110.0)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="expected more than 0"):
            RateLimit(wrong)


def read_changed_box(folder, *, box=None, captions=CAPTIONS, **change):
    """Scenes and faults if the first box annotation has these changes."""
    one = {**BOXES["annotations"][0], **change} | ({} if box is None else {"bbox": box})
    boxes = {**BOXES, "annotations": [one, *BOXES["annotations"][1:]]}
    paths = written(folder, boxes)
    paths[0].write_text(json.dumps(captions))
    issues = []
    return read_scenes(*paths, issues=issues), issues


NO_BOXES = {
    "no height": [50, 25, 100, 0], "no width": [50, 25, 0, 9], "negative width": [50, 25, -10, 9],
    "NaN": [float("nan"), 25, 10, 9], "endless": [0, 0, float("inf"), 9],
    "huge": [10**400, 0, 9, 9], "to the right": [300, 10, 20, 20], "above": [10, -30, 20, 20],
    "at the edge": [200, 0, 10, 10], "thinner than its digits": [10, 10, 0.01, 50],
    "nothing": [],
}  # fmt: skip


@pytest.mark.parametrize("name", NO_BOXES)
def test_invalid_boxes_are_left_out_and_reported(tmp_path, name):
    scenes, issues = read_changed_box(tmp_path, box=NO_BOXES[name])
    assert [box.name for box in scenes[0].boxes] == ["chair"] and scenes[1].id == 8
    assert [(issue.kind, issue.id) for issue in issues] == [("no box", "7")]
    assert issues[0].field == "instances.json: annotations[0].bbox"


def test_missing_box_does_not_stop(tmp_path):
    for place, count in ((0, 1), (2, 0)):  # the last image has no caption
        boxes = json.loads(json.dumps(BOXES))
        del boxes["annotations"][place]["bbox"]
        issues = []
        scenes = read_scenes(*written(tmp_path, boxes), issues=issues)
        assert len(scenes[0].boxes) == 2 - count and len(issues) == count
    scenes, issues = read_changed_box(tmp_path, bbox=None)
    assert len(scenes[0].boxes) == 1 and "got nothing" in str(issues[0])


def test_box_is_clipped_to_the_image(tmp_path):
    scenes, issues = read_changed_box(tmp_path, box=[150, 50, 500, 500])
    assert scenes[0].boxes[0] == Box("dog", 0.75, 0.5, 1.0, 1.0) and not issues


def test_crowd_annotation_is_described_as_group(tmp_path):
    scenes, issues = read_changed_box(tmp_path, iscrowd=1)
    assert scenes[0].boxes[0].name == "group of dog"
    assert [(issue.kind, issue.id) for issue in issues] == [("crowd", "7")]
    assert read_changed_box(tmp_path, iscrowd=0)[1] == []
    assert "'group of'" in messages(scenes[0], "detail")[0]["content"]
    assert "group of dog: [0.250, " in messages(scenes[0], "detail")[3]["content"]


def test_images_with_duplicate_ids_are_left_out(tmp_path):
    first = CAPTIONS["images"][0]
    for change, left in (({"file_name": "z.png"}, [8]), ({"width": 99}, [8]), ({}, [7, 8])):
        images = [*CAPTIONS["images"], {**first, **change}]
        scenes, issues = read_changed_box(tmp_path, captions={**CAPTIONS, "images": images})
        assert [scene.id for scene in scenes] == left
        kinds = [(issue.kind, issue.field, issue.actual) for issue in issues]
        wanted = ("duplicate id", "captions.json: images[3].id")
        actual = "7, that of images[0] too: neither is used"
        assert kinds == ([(*wanted, actual)] if change else [])


def test_categories_with_duplicate_ids_are_left_out(tmp_path):
    boxes = {**BOXES, "categories": [*BOXES["categories"], {"id": 1, "name": "cat"}]}
    issues = []
    scenes = read_scenes(*written(tmp_path, boxes), issues=issues)
    assert [box.name for box in scenes[0].boxes] == ["chair"]
    assert [issue.kind for issue in issues] == ["duplicate id", "no category"]


def test_warning_counts_faults_without_a_fault_list(tmp_path):
    annotations = [{**one, "bbox": [0, 0, 0, 0]} for one in BOXES["annotations"]]
    with pytest.warns(UserWarning, match=r"annotations\[0\]\.bbox: .*; in all 2 no box"):
        read_scenes(*written(tmp_path, {**BOXES, "annotations": annotations}))
