"""Turn the answer of a language model into a conversation record."""

from __future__ import annotations

import json
import re
from typing import Any

from vlm_fast.training.data.generation.coco import Scene
from vlm_fast.training.data.generation.prompts import QUESTIONS, stable_choice
from vlm_fast.training.data.record_errors import BadRecord, describe
from vlm_fast.training.data.records import IMAGE_PLACEHOLDER, parse_record

FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)
PAIRS = {"reasoning": (1, 1), "conversation": (2, 10)}


class BadAnswer(ValueError):
    """An answer that does not have the requested form.

    Attributes:
        text: the answer, if it was text.
    """

    def __init__(self, why: str, text: str = "") -> None:
        super().__init__(why)
        self.text = text


def parse_answer(scene: Scene, kind: str, text: str) -> dict[str, Any]:
    """LLaVA's JSON record of an answer, with ``<image>`` before or after the first question.

    Args:
        scene: the image that the answer is about.
        kind: one of `prompts.KINDS`.
        text: the answer.

    Raises:
        BadAnswer: the answer is empty, is not the requested JSON, or `parse_record` refuses it.
    """
    name = f"{scene.id}-{kind}"
    if not text.strip():
        raise BadAnswer("expected text, got nothing")
    if kind == "detail":
        pairs = [(QUESTIONS[stable_choice(name, len(QUESTIONS))], text.strip())]
    else:
        pairs = _pairs(text, *PAIRS[kind])
    if any(IMAGE_PLACEHOLDER in part for pair in pairs for part in pair):
        raise BadAnswer(f"expected no {IMAGE_PLACEHOLDER} in questions and answers", text)
    (first, answer), *rest = pairs
    first = (
        f"{IMAGE_PLACEHOLDER}\n{first}"
        if stable_choice(f"{name} image", 2)
        else f"{first}\n{IMAGE_PLACEHOLDER}"
    )
    content = {
        "id": name,
        "image": scene.image,
        "conversations": [
            {"from": role, "value": value}
            for pair in [(first, answer), *rest]
            for role, value in zip(("human", "gpt"), pair, strict=True)
        ],
    }
    try:
        parse_record(content, 0)
    except BadRecord as bad:
        assert bad.issue is not None
        raise BadAnswer(f"{bad.issue.field}: {bad.issue.what}", text) from None
    return content


def _pairs(text: str, least: int, most: int) -> list[tuple[str, str]]:
    fenced = FENCE.match(text.strip())
    try:
        content = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"expected JSON, got {describe(text)}: {error}", text) from None
    if not isinstance(content, list) or not least <= len(content) <= most:
        count = f"{least}" if least == most else f"{least} to {most}"
        raise BadAnswer(f"expected a list of {count}, got {describe(content)}", text)
    pairs = []
    for number, pair in enumerate(content):
        if not isinstance(pair, dict):
            raise BadAnswer(f"[{number}]: expected an object, got {describe(pair)}", text)
        for key in ("question", "answer"):
            value = pair.get(key)
            if not isinstance(value, str) or not value.strip():
                raise BadAnswer(f"[{number}].{key}: expected text, got {describe(value)}", text)
        pairs.append((pair["question"].strip(), pair["answer"].strip()))
    return pairs
