"""Judges: who reads an answer where words cannot be compared by rule.

Published numbers of such benchmarks come from a language model behind an API. Here a judge is a function from requests
to replies. Three ways to have one: a file of replies that were got elsewhere (the requests are written out with
`write_requests`, sent to any model, and come back as JSON lines of id and reply), a function under a name
(`plugins.PLUGINS`, or an entry point of the group `vlm.judge`), or a rule of the benchmark, which is called what it is
in the protocol card.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vlm.data.benchmarks._shared.files import need, read_records
from vlm.data.benchmarks._shared.plugins import find_plugin
from vlm.data.errors import DataError


class Request(NamedTuple):
    """What a judge is asked; `id` is unique in a benchmark and the key of a saved reply."""

    id: str
    prompt: str


Judge = Callable[[Sequence[Request]], Sequence[str]]


@dataclass(frozen=True)
class SavedJudge:
    """Replies from a file of JSON lines, each with id and reply."""

    path: str
    benchmark: str

    def __call__(self, requests: Sequence[Request]) -> list[str]:
        """Raises DataError where a request has no reply, or the file holds one twice."""
        replies: dict[str, str] = {}
        for number, record in enumerate(read_records(self.path, self.benchmark, "file of replies"), start=1):
            where = f"{self.benchmark}: {self.path}: reply {number}"
            need(record, ("id", "reply"), where)
            if not isinstance(record["reply"], str):
                raise DataError(f"{where}: expected text, found {record['reply']!r}")
            if str(record["id"]) in replies:
                raise DataError(f"{where}: {record['id']!r} comes twice; expected every request once")
            replies[str(record["id"])] = record["reply"]
        missing = [request.id for request in requests if request.id not in replies]
        if missing:
            raise DataError(
                f"{self.benchmark}: {self.path}: {len(missing)} of {len(requests)} requests have no reply, the first "
                f"is {missing[0]!r}"
            )
        return [replies[request.id] for request in requests]


def is_saved(name: str) -> bool:
    """Whether a judge's name is the path of a file of replies."""
    return name.endswith((".json", ".jsonl"))


def open_judge(name: str, rule: str, benchmark: str) -> Judge | None:
    """The judge of that name, None for the benchmark's own rule.

    Raises:
        DataError: neither the rule's name, nor the path of a .json or .jsonl file, nor known otherwise.
    """
    if name == rule:
        return None
    if is_saved(name):
        return SavedJudge(name, benchmark)
    return find_plugin("judge", name, (rule, "a .jsonl file of replies"), f"{benchmark}: judge")


def ask_judge(judge: Judge, requests: Sequence[Request], benchmark: str) -> list[str]:
    """One reply per request. Raises DataError where the judge gives another number of them."""
    replies = list(judge(requests))
    if len(replies) != len(requests):
        raise DataError(f"{benchmark}: judge: expected {len(requests)} replies, found {len(replies)}")
    return replies


def write_requests(requests: Sequence[Request], path: str | Path) -> None:
    """Write requests as JSON lines of id and prompt; what comes back needs id and reply."""
    lines = [json.dumps(request._asdict(), ensure_ascii=False) + "\n" for request in requests]
    Path(path).write_text("".join(lines), encoding="utf-8")
