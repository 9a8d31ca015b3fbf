"""Instruction data generation from captions and boxes, with a local HTTP server."""

import json
import logging
import os
import signal
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.support.chat_server import completion, good, serving
from tests.support.coco_annotations import BOXES, CAPTIONS
from vlm_fast.cli import main
from vlm_fast.training.data import check
from vlm_fast.training.data.generation import KINDS, Endpoint, RateLimit, Unavailable
from vlm_fast.training.data.generation.answers import BadAnswer

KEY = "sk-a-secret-that-nobody-may-see"
HELLO = [{"role": "user", "content": "Hello"}]
SOON = {"Retry-After": "0.001"}  # the client treats 0 as no advice


@pytest.fixture(scope="module")
def running():
    with serving() as server:
        yield server


@pytest.fixture
def server(running, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running.__init__()
    return running


@pytest.fixture
def endpoint(server):
    return Endpoint("m", base_url=server.url)


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps(CAPTIONS))
    (tmp_path / "instances.json").write_text(json.dumps(BOXES))
    (tmp_path / "images").mkdir()
    for number in (7, 8):
        Image.new("RGB", (20, 10)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def generate(coco, *more, url="http://127.0.0.1:9/v1", rate=10**9):
    arguments = {
        "--captions": coco / "captions.json", "--boxes": coco / "instances.json",
        "--images": coco / "images", "--out": coco / "out.json", "--model": "m",
        "--base-url": url, "--rate": rate,
    }  # fmt: skip
    words = [str(word) for pair in arguments.items() for word in pair]
    found = CliRunner().invoke(main.app, ["data", "generate", *words, *map(str, more)])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


def logged(coco):
    return [json.loads(line) for line in (coco / "out.json.resume.jsonl").read_bytes().splitlines()]


def assert_no_key(coco, found, caplog):
    files = [path for path in coco.rglob("*") if path.is_file()]
    assert len(files) > 3
    for half in (KEY, KEY[: len(KEY) // 2], KEY[len(KEY) // 2 :]):
        assert half not in found.output + found.stderr + caplog.text
        assert not [path for path in files if half.encode() in path.read_bytes()]


def test_each_question_is_sent_once_and_answers_are_valid_records(server, coco, caplog):
    found = generate(coco, "--json", url=server.url)
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == {
        "questions": 6, "asked now": 6, "good records": 6, "not answered well": 0, "failed": {},
        "why": None, "out": str(coco / "out.json"),
    }  # fmt: skip
    result = check(coco / "out.json", coco / "images")
    assert (result.total, result.good, result.issues) == (6, 6, [])
    records = json.loads((coco / "out.json").read_text())
    assert [one["id"] for one in records] == [f"{n}-{kind}" for n in (7, 8) for kind in KINDS]
    assert [len(one["conversations"]) for one in records] == [2, 2, 8] * 2
    assert {one["image"] for one in records} == {"7.png", "8.png"}
    assert server.keys == [f"Bearer {KEY}"] * 6
    assert_no_key(coco, found, caplog)
    # A second run sends nothing, and the file is unchanged.
    before = (coco / "out.json").read_bytes()
    found = generate(coco, url=server.url)
    assert found.exit_code == 0 and len(server.requests) == 6
    assert ["asked", "now", "0"] in [line.split() for line in found.stdout.splitlines()]
    assert (coco / "out.json").read_bytes() == before
    # A run with one kind and a limit continues with all kinds and a larger limit.
    (coco / "out.json").unlink()
    (coco / "out.json.resume.jsonl").unlink()
    for limit, count in ((1, 7), (2, 8)):
        generate(coco, "--kind", "reasoning", "--limit", limit, url=server.url)
        assert len(server.requests) == count
    assert [entry.get("task") for entry in logged(coco)] == [None, "7-reasoning", "8-reasoning"]


def test_request_contents(server, coco):
    generate(coco, url=server.url)
    for request in server.requests:
        assert request["model"] == "m"
        roles = [message["role"] for message in request["messages"]]
        assert roles == ["system", "user", "assistant", "user"]
    contents = [request["messages"][-1]["content"] for request in server.requests]
    assert set(contents[:3]) == {
        "A dog on a chair.\nA chair.\n\n"
        "dog: [0.250, 0.250, 0.750, 0.755]\nchair: [0.000, 0.000, 1.000, 0.990]"
    }
    assert set(contents[3:]) == {"A cat.\n\n(no objects are listed)"}
    assert len({request["messages"][0]["content"] for request in server.requests}) == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_client_retries_after_the_advised_delay(server, endpoint, status):
    server.replies = [(status, SOON, b"{}"), (status, SOON, b"{}"), completion("yes")]
    assert endpoint.ask(HELLO) == "yes"
    assert [request["messages"] for request in server.requests] == [HELLO] * 3


def test_failing_endpoint_stops_the_run_without_losing_answers(server, coco):
    server.replies = [good, *[(503, SOON, b"busy")] * 6]
    found = generate(coco, url=server.url)
    assert found.exit_code == main.Exit.FAILURE
    assert "busy'; run the same command again" in found.stderr
    assert [one["id"] for one in json.loads((coco / "out.json").read_text())] == ["7-detail"]
    before = len(server.requests)
    assert generate(coco, url=server.url).exit_code == 0
    assert len(server.requests) == before + 5


def test_bad_answer_is_retried_then_recorded(server, coco):
    server.replies = [completion("no"), completion(None), good, completion("no"), completion("{}")]
    options = ("--kind", "reasoning", "--again", 2)
    found = generate(coco, *options, url=server.url)
    assert len(server.requests) == 6 and found.exit_code == 0  # the last one was good
    messages = [[message["content"] for message in one["messages"][4:]] for one in server.requests]
    # The model gets its previous answer, if there is one, and the fault in it.
    assert messages[0] == messages[2] == messages[3] == []
    assert messages[1][0] == messages[4][0] == "no" and messages[5][0] == "{}"
    assert all("expected JSON, got 'no'" in messages[n][1] for n in (1, 4))
    assert "expected a list of 1, got an object of 0" in messages[5][1]
    (coco / "out.json.resume.jsonl").unlink()
    (coco / "out.json").unlink()
    server.replies = [good, *[completion("no")] * 3]
    for _ in range(2):  # failed questions are not sent again
        found = generate(coco, *options, url=server.url)
        assert found.exit_code == main.Exit.FAILURE and len(server.requests) == 10
        assert "8-reasoning: expected JSON, got 'no'" in found.stdout
    assert [sorted(entry) for entry in logged(coco)[1:]] == [
        ["record", "task"], ["failed", "task"],
    ]  # fmt: skip
    assert check(coco / "out.json", coco / "images").good == 1


@pytest.mark.parametrize(
    "reply",
    [b"{", b"", b"[]", b'"text"', {}, {"choices": []}, {"choices": None}, {"choices": [{}]},
     completion(None), completion("cut", "length"),
     (200, {"Content-Type": "text/html"}, b"<html>")],
    ids=str,
)  # fmt: skip
def test_malformed_response_is_a_bad_answer(server, endpoint, reply):
    server.replies = [reply]
    with pytest.raises(BadAnswer, match=r"expected a chat completion|expected text|was cut off"):
        endpoint.ask(HELLO)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_rejecting_endpoint_stops_the_run_at_once(server, coco, caplog, status):
    # A truncated message must not contain half of the key.
    body = {"error": {"message": f"{'x' * 255}{KEY} is wrong", "code": KEY, "type": KEY}}
    server.replies = [(status, {}, body)]
    found = generate(coco, "--json", url=server.url)
    assert found.exit_code == main.Exit.ENVIRONMENT and len(server.requests) == 1
    assert f"HTTP {status}" in found.stderr
    assert_no_key(coco, found, caplog)


def test_refused_question_is_recorded_and_others_continue(server, coco, caplog):
    server.replies = [(400, {}, {"error": {"message": f"no: {KEY}"}})]
    found = generate(coco, url=server.url)
    assert found.exit_code == main.Exit.FAILURE and len(server.requests) == 6
    assert "7-detail: HTTP 400" in found.stdout
    assert_no_key(coco, found, caplog)


def test_api_key_is_removed_from_answers(server, coco, caplog):
    text = f"A dog. {KEY} A chair."
    server.replies = [completion(text), completion(text), completion(f"[{KEY}")]
    found = generate(coco, "--kind", "detail", "--kind", "reasoning", "--limit", 2, url=server.url)
    assert logged(coco)[1]["record"]["conversations"][1]["value"] == "A dog. [the key] A chair."
    assert_no_key(coco, found, caplog)


def test_placeholder_key_is_not_removed_from_answers(server, monkeypatch):
    monkeypatch.setenv("OTHER", "dog")
    server.replies = [completion("A dog.")]
    endpoint = Endpoint("m", key_variable="OTHER", base_url=server.url)
    assert endpoint.ask(HELLO) == "A dog."
    assert server.keys == ["Bearer dog"]


def test_connection_failure_is_reported(server):
    endpoint = Endpoint("m", base_url="http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(Unavailable, match="no connection to the endpoint") as raised:
        endpoint.ask(HELLO)
    assert raised.value.__context__ is None and raised.value.__cause__ is None


@pytest.mark.usefixtures("inherited_sigint")
def test_interrupt_leaves_a_resume_log(server, coco):
    def interrupting(request):
        os.kill(os.getpid(), signal.SIGINT)
        return good(request)

    server.replies = [good, good, interrupting]
    found = generate(coco, url=server.url)
    assert found.exit_code == main.Exit.INTERRUPTED
    assert "interrupted; run the same command again to go on" in found.stderr
    assert [entry.get("task") for entry in logged(coco)] == [None, "7-detail", "7-reasoning"]
    assert len(json.loads((coco / "out.json").read_text())) == 2
    # Torn, as after a crash.
    path = coco / "out.json.resume.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    assert generate(coco, url=server.url).exit_code == 0
    assert len(server.requests) == 3 + 5
    assert len(json.loads((coco / "out.json").read_text())) == 6
    assert len({entry.get("task") for entry in logged(coco)}) == 7


def test_requests_follow_the_rate_limit(server, coco, monkeypatch):
    waited = []
    monkeypatch.setattr(
        RateLimit.__init__, "__kwdefaults__", dict(clock=lambda: sum(waited), sleep=waited.append)
    )
    # A retry of the client counts as a request.
    server.replies = [good, (503, SOON, b"busy")]
    assert generate(coco, "--limit", 3, url=server.url, rate=20).exit_code == 0
    assert len(server.requests) == 4
    assert waited == [pytest.approx(3.0)] * 3


def test_dry_run_needs_no_key_and_sends_and_writes_nothing(server, coco, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setitem(sys.modules, "openai", None)
    before = sorted(coco.rglob("*"))
    found = generate(coco, "--dry-run", url=server.url)
    assert found.exit_code == 0 and "6 questions; 3 of them shown" in found.stdout
    assert found.stdout.count("A dog on a chair.\nA chair.\n\ndog: [0.250") == 3
    content = json.loads(generate(coco, "--dry-run", "--limit", 4, "--json", url=server.url).stdout)
    assert content["questions"] == 4
    assert [one["task"] for one in content["prompts"]] == [
        "7-detail", "7-reasoning", "7-conversation", "8-detail",
    ]  # fmt: skip
    assert not server.requests and sorted(coco.rglob("*")) == before


def test_missing_settings_are_reported_before_writing(server, coco, monkeypatch, caplog):
    before = sorted(coco.rglob("*"))
    for between in ("\n", " ", "é"):
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}{between}{KEY}")
        found = generate(coco, url=server.url)
        assert (
            found.exit_code == main.Exit.ENVIRONMENT and "letters that no key has" in found.stderr
        )
        assert KEY not in found.output
    found = generate(coco, "--key-variable", "NO_SUCH_KEY", url=server.url)
    assert found.exit_code == main.Exit.ENVIRONMENT
    assert "the environment variable NO_SUCH_KEY is not set" in found.stderr
    monkeypatch.setitem(sys.modules, "openai", None)
    found = generate(coco, url=server.url)
    assert found.exit_code == main.Exit.ENVIRONMENT
    assert "pip install 'vlm_fast[generate]'" in found.stderr
    assert not server.requests and sorted(coco.rglob("*")) == before


def test_invalid_arguments_are_usage_errors(server, coco):
    (coco / "old.json").write_text("[]")
    for arguments, words in (
        (("--captions", coco / "no.json"), "--captions: there is no file"),
        (("--boxes", coco / "no.json"), "--boxes: there is no file"),
        (("--images", coco / "no"), "--images: there is no folder"),
        (("--out", coco / "no" / "out.json"), "--out: there is no directory"),
        (("--out", coco / "old.json"), "and no resume log of it: choose another"),
        (("--kind", "poem"), "'poem' is not one of 'detail'"),
        (("--limit", "0"), "limit"),
        (("--rate", "0"), "rate"),
    ):
        found = generate(coco, *arguments, url=server.url)
        assert found.exit_code == main.Exit.USAGE and words in found.stderr, words
    assert not server.requests


def test_annotations_of_wrong_structure_fail(coco):
    (coco / "captions.json").write_text("[]")
    found = generate(coco, "--dry-run")
    assert found.exit_code == main.Exit.FAILURE
    assert "captions.json: images: annotation: expected a list" in found.stderr


def test_missing_image_is_reported_before_any_request(server, coco):
    (coco / "images" / "8.png").unlink()
    found = generate(coco, url=server.url)
    assert found.exit_code == main.Exit.FAILURE and "missing image" in found.stderr
    assert not server.requests


def test_resume_log_of_another_model_is_a_usage_error(server, coco):
    generate(coco, "--limit", 1, url=server.url)
    found = generate(coco, "--model", "other", url=server.url)
    assert found.exit_code == main.Exit.USAGE
    assert "--out: " in found.stderr and "is a resume log of model 'm', " in found.stderr
    assert len(server.requests) == 1


def test_skipped_annotations_are_counted_before_any_request(server, coco):
    first, second, other = BOXES["annotations"]
    boxes = [{**first, "bbox": [9, 9, 0, 9]}, {**second, "iscrowd": 1}, other]
    (coco / "instances.json").write_text(json.dumps({**BOXES, "annotations": boxes}))
    found = generate(coco, "--dry-run")
    assert found.exit_code == 0 and not server.requests
    assert "record '7', instances.json: annotations[0].bbox: no box: " in found.stderr
    assert "annotations left out, or told as groups: 1 no box, 1 crowd" in found.stderr
    assert "group of chair: [0.000, 0.000, 1.000, 0.990]" in found.stdout
    for more in ("--dry-run", "--limit=1"):
        content = json.loads(generate(coco, more, "--json", url=server.url).stdout)
        assert content["annotations"] == {"no box": 1, "crowd": 1}
        assert [issue["id"] for issue in content["faults"]] == ["7", "7"]
