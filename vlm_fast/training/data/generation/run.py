"""Ask a language model about every scene, and write its answers as one dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vlm_fast.atomic_write import write_atomically
from vlm_fast.training.data.generation.answers import BadAnswer, parse_answer
from vlm_fast.training.data.generation.coco import Scene
from vlm_fast.training.data.generation.endpoint import Refused
from vlm_fast.training.data.generation.prompts import EXAMPLE, KINDS, Message, messages
from vlm_fast.training.data.generation.resume_log import ResumeLog
from vlm_fast.training.data.record_errors import describe
from vlm_fast.training.data.records import Progress


class ChatEndpoint(Protocol):
    """An `Endpoint`, or another object that raises the same exceptions."""

    def ask(self, messages: list[Message]) -> str: ...


@dataclass(frozen=True)
class Task:
    """One request to the model, which becomes a record of the dataset.

    Attributes:
        scene: the image that is asked about.
        kind: one of `prompts.KINDS`.
    """

    scene: Scene
    kind: str

    @property
    def name(self) -> str:
        """Id of the record."""
        return f"{self.scene.id}-{self.kind}"

    @property
    def messages(self) -> list[Message]:
        """The chat messages of the request."""
        return messages(self.scene, self.kind)


def tasks(scenes: Iterable[Scene], kinds: Iterable[str], limit: int | None = None) -> list[Task]:
    """One task for each kind of each scene, scene by scene; only the first ``limit`` of them.

    Raises:
        ValueError: a kind is unknown.
    """
    chosen = tuple(kinds)
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise ValueError(f"kinds has {describe(unknown[0])}, expected some of {', '.join(KINDS)}")
    return [Task(scene, kind) for scene in scenes for kind in chosen][:limit]


def resume_log_path(out: Path) -> Path:
    """The path of the resume log of a dataset."""
    return out.with_name(out.name + ".resume.jsonl")


def log_header(model: str) -> dict[str, Any]:
    """The header of a resume log, so that answers to other prompts or models are not mixed."""
    prompts = json.dumps([messages(EXAMPLE, kind) for kind in KINDS])
    return {"model": model, "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16]}


class GenerationRun:
    """Asks for every task without an answer in the log, and writes all good records to ``out``.

    Args:
        out: the conversation JSON.
        todo: all tasks of the dataset, including answered ones.
        endpoint: receives the requests.
        log: answers so far.
        again: how often a task is asked again after a bad answer. The model is shown its answer and
            what is wrong with it. Then the task is recorded as failed.
    """

    def __init__(
        self, out: Path, todo: list[Task], endpoint: ChatEndpoint, log: ResumeLog, *, again: int = 2
    ) -> None:
        self.out, self.todo, self.endpoint, self.again = out, todo, endpoint, again
        self.log = log

    def generate(self, progress: Progress | None = None) -> None:
        """Ask, and write ``out`` at the end, also after an interruption.

        Args:
            progress: called with the number of finished tasks and the number of all tasks.

        Raises:
            Unavailable: the endpoint answers no more; running again resumes.
        """
        try:
            for done, task in enumerate(self.todo, 1):
                if task.name not in self.log.entries:
                    self._ask(task)
                if progress is not None:
                    progress(done, len(self.todo))
        finally:
            content = json.dumps(self.records, indent=1, ensure_ascii=False)
            write_atomically(self.out, content)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The good records, in the order of their requests."""
        entries = self.log.entries.values()
        return [entry["record"] for entry in entries if "record" in entry]

    @property
    def failed(self) -> dict[str, str]:
        """The reason for each task without a good answer, by the task's name."""
        entries = self.log.entries.values()
        return {entry["task"]: entry["failed"] for entry in entries if "failed" in entry}

    def _ask(self, task: Task) -> None:
        asked = task.messages
        why = ""
        for _ in range(1 + self.again):
            try:
                content = parse_answer(task.scene, task.kind, self.endpoint.ask(asked))
            except BadAnswer as bad:
                why = str(bad)
                asked = task.messages + _correction(bad)
            except Refused as refused:
                why = str(refused)
                break
            else:
                self.log.add(task.name, record=content)
                return
        self.log.add(task.name, failed=why)


def _correction(bad: BadAnswer) -> list[Message]:
    if not bad.text.strip():
        return []
    words = f"This cannot be used: {bad}. Answer again, in the form that was asked for."
    return [{"role": "assistant", "content": bad.text}, {"role": "user", "content": words}]
