"""The records that an evaluation and its pictures consist of, checked as they are read.

Rates are fractions in [0, 1]. Keys that are not named here are left alone, so that a newer evaluation still reports.
"""

import base64
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

PNG = b"\x89PNG\r\n\x1a\n"

Rate = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Interval = tuple[Rate, Rate]

FEWEST = 50  # captions that a position in the caption needs to be shown: two points each at most


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
    warnings: tuple[str, ...] = ()


class Chair(Value):
    """CHAIR scores of captions; ``ci`` is the interval of ``chair_s``, ``ci_i`` of ``chair_i``; ``length`` in words.

    ``by_position[k]`` is the share of hallucinated ones among the objects named as number k (from 0) of a caption,
    ``by_position_n[k]`` the number of captions that get that far.
    """

    chair_s: Rate
    chair_i: Rate | None = None
    recall: Rate | None = None
    length: NotNegative | None = None
    n: int | None = None
    ci: Interval | None = None
    ci_i: Interval | None = None
    by_position: tuple[Rate | None, ...] = ()
    by_position_n: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def positions(self) -> tuple[float | None, ...]:
        """``by_position`` where enough captions get that far to say something (or where it is not known how many)."""
        counts = self.by_position_n or (FEWEST,) * len(self.by_position)
        return tuple(rate for rate, count in zip(self.by_position, counts, strict=False) if count >= FEWEST)


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
    """What one result cost: seconds of its evaluation, of the prefill of a batch and of each further token of it; FLOPs
    and bytes of a prompt."""

    seconds: NotNegative | None = None
    visual_tokens: VisualTokens | None = None
    llm_flops_per_prompt: NotNegative | None = None
    kv_bytes_per_prompt: NotNegative | None = None
    prefill_s: NotNegative | None = None
    token_s: float | None = None  # a difference of two times, which noise may make negative


class Change(Value):
    """A result minus plain, compared item by item, with the interval of that."""

    difference: float
    ci: tuple[float, float]


class Result(Value):
    """One row of the comparison, with scores, cost and protocol: a pruner, a cache policy, mitigators and a decoder
    of its own, all absent in the plain one.

    ``change[benchmark][field]``, where an evaluation gives it, is the paired change against plain.
    """

    label: str
    prune: dict[str, Any] | None = None
    kv: dict[str, Any] | None = None
    mitigate: dict[str, Any] | list[dict[str, Any]] | None = None
    decode: dict[str, Any] | None = None
    metrics: dict[str, Scores] = {}
    change: dict[str, dict[str, Change]] = {}
    cost: Cost = Cost()
    protocol: dict[str, dict[str, Any]] = {}

    @property
    def is_plain(self) -> bool:
        return not (self.prune or self.kv or self.mitigate or self.decode)


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
