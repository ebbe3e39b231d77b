"""Reads a run folder into plain values and says what is missing.

A part that a run did not write, or a last line that a killed run cut off, becomes a note that the page shows; what is
there but malformed is an error, for a report must not be silently wrong. Rates are fractions in [0, 1] throughout.
"""

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

PNG = b"\x89PNG\r\n\x1a\n"

Rate = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Interval = tuple[Rate, Rate]


class ReportError(ValueError):
    """A run folder that cannot be reported. One line: file, place, expected, found."""


class Value(BaseModel):
    """A frozen record; keys that the report does not know are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class YesNo(Value):
    """Scores of a yes-no benchmark such as POPE; ``ci`` is the interval of the accuracy."""

    accuracy: Rate
    precision: Rate | None = None
    recall: Rate | None = None
    f1: Rate | None = None
    yes_ratio: Rate | None = None
    n: int | None = None
    ci: Interval | None = None


class Chair(Value):
    """CHAIR scores of captions; ``ci`` is the interval of ``chair_s``, ``length`` counts words.

    ``by_position[k]`` is the share of hallucinated ones among the objects named as number k (from 0) of a caption.
    """

    chair_s: Rate
    chair_i: Rate | None = None
    recall: Rate | None = None
    length: NotNegative | None = None
    n: int | None = None
    ci: Interval | None = None
    by_position: tuple[Rate | None, ...] = ()


class Other(Value):
    """A benchmark that the report does not know: its plain numbers are shown and never judged."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)


def _kind(scores: Any) -> str:
    if isinstance(scores, Mapping):
        return "<chair>" if "chair_s" in scores else "<yes-no>" if "accuracy" in scores else "<other>"
    return "<other>"


Scores = Annotated[
    Annotated[YesNo, Tag("<yes-no>")] | Annotated[Chair, Tag("<chair>")] | Annotated[Other, Tag("<other>")],
    Discriminator(_kind),
]


class VisualTokens(Value):
    """Visual tokens of one prompt: what the encoder gave, what is left, and the mean over the decoder's layers."""

    before: NotNegative
    after: NotNegative
    average: NotNegative | None = None


class Cost(Value):
    """What one result cost: wall seconds of its evaluation, and FLOPs and bytes computed for one prompt."""

    seconds: NotNegative | None = None
    visual_tokens: VisualTokens | None = None
    llm_flops_per_prompt: NotNegative | None = None
    kv_bytes_per_prompt: NotNegative | None = None


class Result(Value):
    """One row of the comparison: a pruner and mitigators (both absent: plain) with scores, cost and protocol."""

    label: str
    prune: dict[str, Any] | None = None
    mitigate: dict[str, Any] | list[dict[str, Any]] | None = None
    metrics: dict[str, Scores] = {}
    cost: Cost = Cost()
    protocol: dict[str, dict[str, Any]] = {}

    @property
    def is_plain(self) -> bool:
        return not self.prune and not self.mitigate


class Evaluation(Value):
    name: str = ""
    created: str = ""
    recipe_hash: str = ""
    versions: dict[str, Any] = {}
    results: tuple[Result, ...] = ()

    @property
    def plain(self) -> Result | None:
        """The result without a method, which the others are compared with."""
        return next((result for result in self.results if result.is_plain), None)

    @property
    def methods(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if not result.is_plain)


class Mention(Value):
    """An object that an answer names, at the characters ``start`` up to (not with) ``end``."""

    text: str = ""
    start: Annotated[int, Field(ge=0)]
    end: int
    object: str
    hallucinated: bool


class View(Value):
    """What one result did with one picture: raster ids of the kept patches (null: all), heat per patch, the answer."""

    label: str
    grid: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    kept: list[int] | None = None
    heat: list[NotNegative] | None = None
    answer: str = ""
    mentions: tuple[Mention, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        patches = self.grid[0] * self.grid[1]
        if self.kept is not None and any(not 0 <= patch < patches for patch in self.kept):
            raise ValueError(f"kept: expected raster ids below {patches}, found {max(self.kept, key=abs)}")
        if self.heat is not None and len(self.heat) != patches:
            raise ValueError(f"heat: expected {patches} numbers for the grid, found {len(self.heat)}")
        end = 0
        for mention in sorted(self.mentions, key=lambda mention: mention.start):
            if not end <= mention.start < mention.end <= len(self.answer):
                raise ValueError(
                    f"mentions: '{mention.object}' at {mention.start}..{mention.end} overlaps another "
                    f"or leaves the answer of {len(self.answer)} characters"
                )
            end = mention.end
        return self


class Picture(Value):
    key: str
    png: str
    width: Annotated[int, Field(ge=1)]
    height: Annotated[int, Field(ge=1)]
    objects: tuple[str, ...] = ()
    views: tuple[View, ...] = ()

    @model_validator(mode="after")
    def _is_png(self) -> Self:
        if not base64.b64decode(self.png, validate=True).startswith(PNG):
            raise ValueError("png: expected the base64 of a PNG file")
        return self


class Pictures(Value):
    items: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Stage:
    """The logged steps of one stage. ``curves[quantity]`` is one number per step, NaN where it was not logged."""

    number: int
    name: str
    planned: int | None
    steps: list[int]
    curves: dict[str, list[float]]


@dataclass(frozen=True)
class Run:
    """All that a run folder says; ``notes`` lists in words what is missing or was cut off."""

    name: str
    recipe: str
    stages: list[Stage] = field(default_factory=list)
    evaluation: Evaluation = field(default_factory=Evaluation)
    pictures: tuple[Picture, ...] = ()
    notes: list[str] = field(default_factory=list)


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
    return Run(name, recipe, stages, evaluation, pictures.items, notes)


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


def read_stages(written: str, notes: list[str]) -> list[Stage]:
    """The curves of each stage from the text of metrics.jsonl, in the order of the stages.

    A last line without its newline that is not JSON was cut off by a kill: a note. A step that is logged again was
    run again after a resume: what the later lines say is what the model went through, so the earlier ones go.
    """
    records = _records(written, notes)
    kept: list[dict[str, Any]] = []
    resumed = 0
    for record in records:
        here = (record["stage"], record["step"])
        resumed += bool(kept) and (kept[-1]["stage"], kept[-1]["step"]) >= here
        while kept and (kept[-1]["stage"], kept[-1]["step"]) >= here:
            kept.pop()
        kept.append(record)
    if resumed:
        notes.append(f"The run was resumed {resumed} time(s); curves show the steps that count, as logged last.")
    numbers = sorted({record["stage"] for record in kept})
    stages = [_stage([record for record in kept if record["stage"] == number]) for number in numbers]
    for stage in stages:
        _note_gaps(stage, notes)
    return stages


def _records(written: str, notes: list[str]) -> list[dict[str, Any]]:
    records = []
    lines = written.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                notes.append("The last line of metrics.jsonl is cut off (the run was stopped while writing it).")
                break
            raise ReportError(f"metrics.jsonl:{number}: expected one JSON object, {error.msg}") from None
        records.append(_checked(record, number))
    return records


def _checked(record: Any, number: int) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ReportError(f"metrics.jsonl:{number}: expected one JSON object, found {type(record).__name__}")
    for key in ("stage", "step"):
        if type(record.get(key)) is not int:
            raise ReportError(f"metrics.jsonl:{number}: {key}: expected a whole number, found {record.get(key)!r}")
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
    interval = stage.steps[-1] - stage.steps[-2] if len(stage.steps) > 1 else 1
    if stage.planned is not None and stage.planned - stage.steps[-1] > interval:
        notes.append(f"Stage {stage.name}: the last logged step is {stage.steps[-1]} of {stage.planned}.")
