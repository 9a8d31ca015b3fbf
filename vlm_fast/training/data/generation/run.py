"""All that is to be asked, asked once, and written as one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vlm_fast.atomic_write import write_atomically
from vlm_fast.training.data.generation.answers import BadAnswer, record
from vlm_fast.training.data.generation.coco import Scene
from vlm_fast.training.data.generation.endpoint import Refused
from vlm_fast.training.data.generation.prompts import EXAMPLE, KINDS, Message, messages
from vlm_fast.training.data.generation.resume_log import ResumeLog
from vlm_fast.training.data.record_errors import describe
from vlm_fast.training.data.records import Progress


class ChatEndpoint(Protocol):
    """What answers: an ``Endpoint``, or another that raises what it does."""

    def ask(self, messages: list[Message]) -> str: ...


@dataclass(frozen=True)
class Task:
    """One question to the model: a record of the data set, if it is answered well."""

    scene: Scene
    kind: str

    @property
    def name(self) -> str:
        return f"{self.scene.id}-{self.kind}"

    @property
    def messages(self) -> list[Message]:
        return messages(self.scene, self.kind)


def tasks(scenes: Iterable[Scene], kinds: Iterable[str], limit: int | None = None) -> list[Task]:
    """Each kind of each scene, scene by scene; the first ``limit`` of them."""
    chosen = tuple(kinds)
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise ValueError(f"kinds has {describe(unknown[0])}, expected some of {', '.join(KINDS)}")
    return [Task(scene, kind) for scene in scenes for kind in chosen][:limit]


def resume_log_path(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def log_header(model: str) -> dict[str, Any]:
    """What a journal is of: answers of another model, or to other prompts, do not belong in it."""
    prompts = json.dumps([messages(EXAMPLE, kind) for kind in KINDS])
    return {"model": model, "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16]}


class GenerationRun:
    """Asks what the journal has no answer to, and writes all good records to ``out``.

    Args:
        out: the conversation JSON.
        todo: all tasks of the data set, those answered before too.
        endpoint: asked for each.
        journal: what was answered before, and will be.
        again: how often at most a task is asked again after a bad answer, which is shown to the
            model with what is wrong with it. After that it is recorded as failed.
    """

    def __init__(
        self,
        out: Path,
        todo: list[Task],
        endpoint: ChatEndpoint,
        journal: ResumeLog,
        *,
        again: int = 2,
    ) -> None:
        self.out, self.todo, self.endpoint, self.again = out, todo, endpoint, again
        self.journal = journal

    def go(self, progress: Progress | None = None) -> None:
        """Ask; write ``out`` at the end, and also where this is interrupted.

        Raises:
            Unavailable: where the endpoint answers nothing any more; running again goes on.
        """
        try:
            for done, task in enumerate(self.todo, 1):
                if task.name not in self.journal.entries:
                    self._ask(task)
                if progress is not None:
                    progress(done, len(self.todo))
        finally:
            content = json.dumps(self.records, indent=1, ensure_ascii=False)
            write_atomically(self.out, content)

    @property
    def records(self) -> list[dict[str, Any]]:
        """Those answered well, in the order in which they were asked for."""
        entries = self.journal.entries.values()
        return [entry["record"] for entry in entries if "record" in entry]

    @property
    def failed(self) -> dict[str, str]:
        """The names of tasks without a good answer, and why."""
        entries = self.journal.entries.values()
        return {entry["task"]: entry["failed"] for entry in entries if "failed" in entry}

    def _ask(self, task: Task) -> None:
        asked = task.messages
        why = ""
        for _ in range(1 + self.again):
            try:
                content = record(task.scene, task.kind, self.endpoint.ask(asked))
            except BadAnswer as bad:
                why = str(bad)
                asked = task.messages + _correction(bad)
            except Refused as refused:
                why = str(refused)
                break
            else:
                self.journal.add(task.name, record=content)
                return
        self.journal.add(task.name, failed=why)


def _correction(bad: BadAnswer) -> list[Message]:
    if not bad.text.strip():
        return []
    words = f"This cannot be used: {bad}. Answer again, in the form that was asked for."
    return [{"role": "assistant", "content": bad.text}, {"role": "user", "content": words}]
