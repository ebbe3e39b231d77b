"""Reads a run folder into plain values and says what is missing.

A part that a run did not write, or a last line that a killed run cut off, becomes a note that the page shows; what is
there but malformed is an error, for a report must not be silently wrong.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vlm.report.records import Evaluation, Picture, Pictures


class ReportError(ValueError):
    """A run folder that cannot be reported. One line: file, place, expected, found."""


@dataclass(frozen=True)
class Stage:
    """The logged steps of one stage, counted from 0. ``curves[quantity]`` has a number per step, NaN where none was."""

    number: int
    name: str
    planned: int | None
    steps: list[int]
    curves: dict[str, list[float]]

    @property
    def done(self) -> int:
        """Steps taken as far as the log tells: all that were planned once the last one is there."""
        return self.planned if self.is_complete and self.planned else self.steps[-1] + 1

    @property
    def is_complete(self) -> bool:
        return self.planned is None or self.steps[-1] >= self.planned - 1


@dataclass(frozen=True)
class Run:
    """All that a run folder says; ``notes`` lists in words what is missing or was cut off."""

    name: str
    recipe: str
    stages: list[Stage] = field(default_factory=list)
    evaluation: Evaluation = field(default_factory=Evaluation)
    pictures: tuple[Picture, ...] = ()
    notes: list[str] = field(default_factory=list)
    during: list[Stage] = field(default_factory=list)  # benchmarks while training, one curve per number


def read_run(folder: Path) -> Run:
    """Read what a run wrote. Raises ReportError when the folder is none, empty of results, or malformed."""
    if not folder.is_dir():
        raise ReportError(f"{folder}: expected the folder of a run, found {'a file' if folder.exists() else 'nothing'}")
    if not any((folder / name).exists() for name in ("metrics.jsonl", "evaluation.json")):
        raise ReportError(f"{folder}: expected metrics.jsonl or evaluation.json of a run, found neither")
    notes: list[str] = []
    recipe = _text(folder / "recipe.yaml", notes, "the recipe is not shown")
    stages = read_stages(_text(folder / "metrics.jsonl", notes, "there are no training curves"), notes)
    evaluation = _json(Evaluation, folder / "evaluation.json", notes, "nothing was evaluated yet")
    pictures = _json(Pictures, folder / "pictures.json", notes, "there are no pictures")
    name = _recipe_name(recipe) or evaluation.name or folder.resolve().name
    during = folder / "evaluations.jsonl"
    judged = read_stages(_text(during, notes, ""), notes, during.name) if during.exists() else []
    return Run(name, recipe, stages, evaluation, pictures.items, notes, judged)


def _text(path: Path, notes: list[str], loss: str) -> str:
    if not path.exists():
        notes.append(f"{path.name} is not in the run folder: {loss}.")
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ReportError(f"{path.name}: expected UTF-8, found {error.reason} at byte {error.start}") from None


Model = TypeVar("Model", bound=BaseModel)


def _json(model: type[Model], path: Path, notes: list[str], loss: str) -> Model:
    written = _text(path, notes, loss)
    if not path.exists():
        return model()
    try:
        return model.model_validate_json(written)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith("<"))
        message = first["msg"].removeprefix("Value error, ")
        raise ReportError(f"{path.name}: {place + ': ' if place else ''}{message}{_found(first)}") from None


def _found(error: Any) -> str:
    """What stood there, when it is short enough to be worth a look."""
    found = repr(error["input"])
    return f", found {found}" if error["type"] not in ("value_error", "json_invalid") and len(found) < 60 else ""


def _recipe_name(recipe: str) -> str:
    try:
        tree = yaml.safe_load(recipe)
    except yaml.YAMLError as error:
        raise ReportError(f"recipe.yaml: {' '.join(str(error).split())}") from None
    return str(tree.get("name") or "") if isinstance(tree, Mapping) else ""


def read_stages(written: str, notes: list[str], file: str = "metrics.jsonl") -> list[Stage]:
    """The curves of each stage from the text of metrics.jsonl, or of another such ``file``, in the order of the stages.

    A last line without its newline that is not JSON was cut off by a kill: a note. A step that is logged again was
    run again after a resume: what the later lines say is what the model went through, so the earlier ones go.
    """
    records = _records(written, notes, file)
    kept: list[dict[str, Any]] = []
    resumed = False
    for record in records:
        here = (record["stage"], record["step"])
        while kept and (kept[-1]["stage"], kept[-1]["step"]) >= here:
            resumed = True
            kept.pop()
        kept.append(record)
    if resumed and file == "metrics.jsonl":
        notes.append("The run was resumed and ran some steps again; the curves show what was logged last.")
    numbers = sorted({record["stage"] for record in kept})
    stages = [_stage([record for record in kept if record["stage"] == number]) for number in numbers]
    for stage in stages if file == "metrics.jsonl" else ():
        _note_gaps(stage, notes)
    return stages


def _records(written: str, notes: list[str], file: str) -> list[dict[str, Any]]:
    records = []
    lines = written.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                notes.append(f"The last line of {file} is cut off (the run was stopped while writing it).")
                break
            raise ReportError(f"{file}:{number}: expected one JSON object, {error.msg}") from None
        records.append(_checked(record, number, file))
    return records


def _checked(record: Any, number: int, file: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ReportError(f"{file}:{number}: expected one JSON object, found {type(record).__name__}")
    for key in ("stage", "step"):
        if type(record.get(key)) is not int:
            raise ReportError(f"{file}:{number}: {key}: expected a whole number, found {record.get(key)!r}")
    return record


def _scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record; those of a nested one as ``outer.inner``."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= _scalars(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = float(value)
    return found


def _stage(records: list[dict[str, Any]]) -> Stage:
    numbers = [_scalars(record) for record in records]
    quantities = dict.fromkeys(key for found in numbers for key in found if key not in ("stage", "step", "steps"))
    curves = {quantity: [found.get(quantity, math.nan) for found in numbers] for quantity in quantities}
    last = records[-1]
    planned = last.get("steps") if type(last.get("steps")) is int else None
    return Stage(last["stage"], str(last.get("name") or last["stage"]), planned, [r["step"] for r in records], curves)


def _note_gaps(stage: Stage, notes: list[str]) -> None:
    loss = stage.curves.get("loss", [math.nan] * len(stage.steps))
    broken = [step for step, value in zip(stage.steps, loss, strict=True) if not math.isfinite(value)]
    if broken:
        notes.append(f"Stage {stage.name}: the loss is missing or not finite, first at step {broken[0]}.")
    if not stage.is_complete:
        notes.append(f"Stage {stage.name}: the last logged step is {stage.steps[-1]} of {stage.planned}.")
