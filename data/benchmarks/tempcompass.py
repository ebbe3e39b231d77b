"""TempCompass: does a model see what happens over time? (Liu et al. 2024, "TempCompass: Do Video LLMs Really Understand
Videos?").

A video is its frames here: `images` holds a folder of numbered pictures per video, of which `frames` evenly spaced ones
are shown in order. Models of this package take images, so that is a protocol of our own; files of answers of video
models are scored as the official script does. Answers no rule can read count as wrong (its `--disable_llm`), or go to a
judge; captions need a judge, who answers a multiple-choice question from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from vlm.data.benchmarks._shared.contract import Question, answers_in_order, card_of
from vlm.data.benchmarks._shared.files import check_limit, need, one_of, read_json
from vlm.data.benchmarks._shared.images import EXTENSIONS
from vlm.data.benchmarks._shared.judge import Request, ask_judge, open_judge
from vlm.data.benchmarks._shared.predictions import Given
from vlm.data.benchmarks._shared.statistics import rate, rate_change
from vlm.data.errors import DataError

RULES = "rules"
DIMENSIONS = ("action", "direction", "speed", "order", "attribute_change")
# task -> what is added to its question
SUFFIXES = {
    "multi-choice": "\nPlease directly give the best option:",
    "yes_no": "\nPlease answer yes or no:",
    "caption_matching": "\nPlease directly give the best option:",
    "captioning": "",
}


@dataclass(frozen=True)
class _Item:
    id: str
    task: str
    video: str
    dimension: str
    type: str
    question: str
    answer: str


@dataclass(frozen=True)
class Tempcompass:
    """TempCompass over its question files.

    Attributes:
        questions: folder with multi-choice.json, yes_no.json, caption_matching.json and captioning.json, or some.
        images: folder of a folder of frames per video; "" where answers of elsewhere are scored.
        meta: meta_info.json, which sorts questions into fine-grained types; without it there are none.
        tasks: which of the files; all that are there but captioning when null.
        frames: how many frames of a video are shown.
        judge: rules, a .jsonl file of replies, or the name of an installed judge, for what no rule can read.
        max_new_tokens: answers are cut there.
        limit: only the first so many videos.
    """

    questions: str
    images: str
    meta: str | None = None
    tasks: Sequence[str] | None = None
    frames: int = 8
    judge: str = RULES
    max_new_tokens: int = 64
    limit: int | None = None

    source: ClassVar[str] = "TempCompass, Liu et al. 2024 (arXiv:2403.00476), section 4; llyx97/TempCompass eval_*.py"
    verified: ClassVar[str] = (
        "equal to the official eval scripts with --disable_llm on the released answers of three models; frames instead "
        "of videos and the judge's prompts are ours"
    )

    def __post_init__(self) -> None:
        for task in self.tasks or ():
            one_of(task, SUFFIXES, "tempcompass: task")
        check_limit(self.limit, "tempcompass")
        if self.frames < 1:
            raise DataError(f"tempcompass: frames: expected a positive number, found {self.frames}")
        open_judge(self.judge, RULES, "tempcompass")
        if self.judge == RULES and "captioning" in (self.tasks or ()):
            raise DataError("tempcompass: task captioning: expected a judge, who answers a question from each caption")

    @cached_property
    def _files(self) -> dict[str, Path]:
        folder = Path(self.questions)
        usual = [task for task in SUFFIXES if task != "captioning" and (folder / f"{task}.json").is_file()]
        files = {task: folder / f"{task}.json" for task in self.tasks or usual}
        if not files:
            raise DataError(f"tempcompass: {self.questions}: expected a folder with {', '.join(SUFFIXES)} (.json)")
        return files

    @cached_property
    def _types(self) -> dict[tuple[str, str], str]:
        """(video, dimension) -> fine-grained type."""
        if self.meta is None:
            return {}
        types = {}
        for video, entry in read_json(self.meta, "tempcompass", "file of types").items():
            need(entry, ("eval_dim",), f"tempcompass: {self.meta}: {video}")
            for dimension, about in entry["eval_dim"].items():
                if about is not None and dimension != "order":
                    need(about, ("type",), f"tempcompass: {self.meta}: {video} {dimension}")
                    types[video, dimension] = about["type"]
        return types

    @cached_property
    def _items(self) -> list[_Item]:
        items = []
        for task, path in self._files.items():
            content = read_json(path, "tempcompass", "question file")
            videos = list(content)[: self.limit]
            items += [
                self._item(task, *place, record, f"tempcompass: {path}")
                for place, record in _records({video: content[video] for video in videos}, f"tempcompass: {path}")
            ]
        return items

    def _item(self, task: str, video: str, dimension: str, number: int, record: Any, where: str) -> _Item:
        need(record, ("question", "answer"), f"{where}: {video} {dimension} {number}")
        is_order = self.meta is not None and dimension == "order"  # which has no finer types, and needs no entry
        kind = "order" if is_order else self._types.get((_video(video), dimension), "")
        if self.meta is not None and not kind:
            raise DataError(f"{where}: {video}: no type of {dimension!r} in {self.meta}")
        question, answer = record["question"], record["answer"]
        return _Item(f"{task}/{_video(video)}/{dimension}/{number}", task, video, dimension, kind, question, answer)

    def ask(self) -> list[Question]:
        """Every question, task by task; an id is task/video/dimension/number, counted from 1. With `images`, each
        has the frames of its video; with "", for scoring answers, none.

        Raises:
            DataError: videos without frames, counted.
        """
        videos = dict.fromkeys(item.video for item in self._items)
        frames = {video: self._frames(_video(video)) for video in videos} if self.images else dict.fromkeys(videos, ())
        missing = [video for video in videos if self.images and not frames[video]]
        if missing:
            raise DataError(
                f"tempcompass: {self.images}: {len(missing)} of {len(videos)} videos have no folder of frames: "
                f"{', '.join(missing[:3])}"
            )
        return [
            Question(item.id, frames[item.video], item.question + SUFFIXES[item.task], item.task)
            for item in self._items
        ]

    def _frames(self, video: str) -> tuple[str, ...]:
        """Evenly spaced frames of a video: the middles of equal parts, in the order of the numbers in their names."""
        there = [file for file in (Path(self.images) / video).glob("*") if file.suffix.lower() in EXTENSIONS]
        ordered = sorted(there, key=lambda file: ([int(n) for n in re.findall(r"\d+", file.stem)], file.name))
        count = min(self.frames, len(ordered))
        return tuple(f"{video}/{ordered[(2 * k + 1) * len(ordered) // (2 * count)].name}" for k in range(count))

    def score(self, answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Per task accuracy, n, ci, match_rate (answers a rule could read), and the accuracy of every dimension and
        fine-grained type.

        Raises:
            DataError: a question has no answer, or the judge gives no reply.
        """
        right, matched = self._judge(answers)
        scores = {}
        for task in self._files:
            rows = [
                (item, one, ruled)
                for item, one, ruled in zip(self._items, right, matched, strict=True)
                if item.task == task
            ]
            parts = [item.dimension for item, _, _ in rows], [item.type for item, _, _ in rows if item.type]
            scores[task] = {
                **rate([one for _, one, _ in rows]),
                "match_rate": sum(ruled for _, _, ruled in rows) / len(rows),
                **{
                    part: _mean(one for item, one, _ in rows if part in (item.dimension, item.type))
                    for part in dict.fromkeys((*parts[0], *parts[1]))
                },
            }
        return scores

    def compare(self, baseline: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Change of accuracy per task: difference, ci, p (McNemar, exact)."""
        before, after = self._judge(baseline)[0], self._judge(answers)[0]
        changes = {}
        for task in self._files:
            places = [place for place, item in enumerate(self._items) if item.task == task]
            first, second = [before[k] for k in places], [after[k] for k in places]
            changes[task] = {"accuracy": rate_change(first, second)}
        return changes

    def judge_requests(self, answers: Mapping[str, str]) -> list[Request]:
        """What a judge is asked: of captions the multiple-choice question, of other answers no rule can read whether
        they are correct or incorrect."""
        given = answers_in_order([item.id for item in self._items], answers, "tempcompass")
        return [
            Request(item.id, self._captioned(item, text) if item.task == "captioning" else _graded(item, text))
            for item, text in zip(self._items, given, strict=True)
            if read_answer(item.task, text, item.question, item.answer) is None
        ]

    def _captioned(self, item: _Item, caption: str) -> str:
        question, _ = self._choices[item.video, item.dimension]
        return (
            f"Description of a video: {caption}\nQuestion: {question}\nChoose the option that follows from the "
            "description alone. Reply with the option as it stands, letter and text, or with: none."
        )

    @cached_property
    def _choices(self) -> dict[tuple[str, str], tuple[str, str]]:
        """(video, dimension) -> the first multiple-choice question and its answer, which captions are judged by."""
        path = Path(self.questions) / "multi-choice.json"
        content = read_json(path, "tempcompass", "question file")
        return {
            (video, dimension): (record["question"], record["answer"])
            for (video, dimension, number), record in _records(content, f"tempcompass: {path}")
            if number == 1
        }

    def read_answers(self, path: str | Path) -> list[Given] | None:
        """The official form: a folder of <task>.json, or the file of a single task, each question with its prediction
        (or response). None where it is another form."""
        there = Path(path)
        if there.is_dir():
            files = {task: there / f"{task}.json" for task in self._files}
        elif there.suffix == ".json" and len(self._files) == 1:
            files = dict.fromkeys(self._files, there)
        else:
            return None
        given = []
        for task, file in files.items():
            where = f"tempcompass: {file}"
            content = read_json(file, "tempcompass", "file of answers")
            if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
                return None
            for (video, dimension, number), record in _records(content, where):
                key = f"{task}/{_video(video)}/{dimension}/{number}"
                if not record.keys() & {"prediction", "response"}:
                    raise DataError(f"{where}: {key}: lacks prediction; found {', '.join(record)}")
                given.append(Given(key, record.get("prediction", record.get("response")), f"{where}: {key}"))
        kept = {video for item in self._items for video in (_video(item.video),)}
        return [one for one in given if self.limit is None or one.id.split("/")[1] in kept]

    def protocol(self) -> dict[str, dict[str, Any]]:
        """The card of every task."""
        meta = [] if self.meta is None else [self.meta]
        return {
            task: card_of(
                self,
                [path, *meta],
                sum(item.task == task for item in self._items),
                prompt="{}" + SUFFIXES[task],
                frames=f"{self.frames} evenly spaced pictures, no video",
                judge=self.judge,
            )
            for task, path in self._files.items()
        }

    def _judge(self, answers: Mapping[str, str]) -> tuple[list[bool], list[bool]]:
        """Right or wrong, and whether a rule could tell, per question."""
        given = answers_in_order([item.id for item in self._items], answers, "tempcompass")
        read = [
            read_answer(item.task, text, item.question, item.answer)
            for item, text in zip(self._items, given, strict=True)
        ]
        judge = open_judge(self.judge, RULES, "tempcompass")
        replies: dict[str, str] = {}
        if judge is not None:
            requests = self.judge_requests(answers)
            told = ask_judge(judge, requests, "tempcompass")
            replies = {request.id: reply for request, reply in zip(requests, told, strict=True)}
        right = [
            self._is_right(item, replies.get(item.id, "")) if one is None else one
            for item, one in zip(self._items, read, strict=True)
        ]
        return right, [one is not None for one in read]

    def _is_right(self, item: _Item, reply: str) -> bool:
        """What a judge's reply says; an empty one says wrong."""
        if item.task != "captioning":
            return "correct" in reply.lower() and "incorrect" not in reply.lower()
        answer = self._choices[item.video, item.dimension][1]
        letters = re.findall(r"\b([A-D])\.", reply)
        return letters == [answer[:1]]


def read_answer(task: str, text: str, question: str, answer: str) -> bool | None:
    """Whether an answer is right, by the official rules of its task; None where they cannot read it.

    >>> read_answer("multi-choice", "B. dribbling", "What? ...", "B. dribbling a ball")
    True
    """
    said = text.replace("</s>", "").strip()
    if task == "yes_no":
        start = said.lower()
        found = "yes" if start.startswith("yes") else "no" if start.startswith("no") else None
        return None if found is None else found == answer
    if task == "multi-choice":
        if said == answer:
            return True
        letter = re.fullmatch(r"([A-D])(?:[.)].*)?", said, re.DOTALL)
        return None if letter is None else letter[1] == answer[:1]
    return _matches(said, question, answer) if task == "caption_matching" else None


def _matches(said: str, question: str, answer: str) -> bool | None:
    """Caption matching: an option whole, its sentence (perhaps behind "A) "), its label ("Option 1", "1"). The last
    kind that fits decides, as in the official script."""
    options = [tuple(line.split(": ", 1)) for line in question.split("\n")[1:] if ": " in line]
    right = _option(answer)
    behind = said.split(") ")[1] if ") " in said else None
    chosen: tuple[str, str] | None = None
    for label, sentence in options:
        if said == f"{label}: {sentence}":
            chosen = label, sentence
    for label, sentence in options:
        if sentence in (said, behind):
            chosen = label, sentence
    for label, sentence in options:
        if said in (label, _bare(label)) or said.replace(".", "") in (label, _bare(label)):
            chosen = label, sentence
    return None if chosen is None else chosen == right


def _option(line: str) -> tuple[str, str]:
    label, _, sentence = line.partition(": ")
    return label, sentence


def _bare(label: str) -> str:
    return re.sub(r"(Sentence|Option|Caption) ", "", label)


def _graded(item: _Item, text: str) -> str:
    return (
        f"Question: {item.question}\nRight answer: {item.answer}\nGiven answer: {text}\n"
        "Is the given answer right? Reply with one word: correct or incorrect."
    )


def _video(name: str) -> str:
    """A video's key: older files of answers call it by the name of its file."""
    return name.removesuffix(".mp4").removesuffix(".jpg")


def _records(content: Any, where: str) -> Iterable[tuple[tuple[str, str, int], dict[str, Any]]]:
    """((video, dimension, number from 1), record) of a file of {video: {dimension: [record]}}."""
    if not isinstance(content, dict):
        raise DataError(f"{where}: expected an object of videos, found a {type(content).__name__}")
    for video, dimensions in content.items():
        if not isinstance(dimensions, dict):
            raise DataError(f"{where}: {video}: expected an object of dimensions, found {dimensions!r}")
        for dimension, records in dimensions.items():
            one_of(dimension, DIMENSIONS, f"{where}: {video}: dimension")
            if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
                raise DataError(f"{where}: {video} {dimension}: expected a list of objects, found {records!r}")
            for number, record in enumerate(records, start=1):
                yield (video, dimension, number), record


def _mean(values: Iterable[bool]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
