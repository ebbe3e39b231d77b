"""Artifacts: what a calibration found for one model, kept in a file that says for which.

A file is safetensors, so reading it runs nothing. Its name holds a hash of the recipe's model, of the method's settings
and of the data; inside, a fingerprint of the weights says for which model the numbers are.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Calibration:
    """Where the numbers of a calibrated method come from: ``auto``, what `vlm calibrate` wrote for this recipe, or the
    path of such a file."""

    where: str = "auto"

    @classmethod
    def parse(cls, value: Any) -> "Calibration":
        """Read a recipe value. Raises ValueError for what is no text."""
        if not isinstance(value, str) or not value:
            raise ValueError(f"must be auto or the path of what `vlm calibrate` wrote, found {value!r}")
        return cls(value)

    def __str__(self) -> str:
        return self.where

    def load(self, facts: Facts, who: str, settings: Mapping[str, Any]) -> "Artifact":
        """What was calibrated for the method ``who`` with these settings.

        Raises ModelError when there is none, naming the command that makes it, or when it is another method's or
        another model's.
        """
        path = Path(self.where)
        if self.where == "auto":
            if facts.shelf is None:
                raise ModelError(f"{who}.calibration: auto belongs to a model of a recipe; give the path of a file")
            path = facts.shelf.find(who, settings)
        return read(path, who, facts)


AUTO = Calibration()


class Artifact(NamedTuple):
    """tensors: what was found. about: who found it, for which model and settings, on which data, and how well."""

    tensors: Mapping[str, Tensor]
    about: Mapping[str, str]

    def get(self, name: str, shape: tuple[int | None, ...], who: str) -> Tensor:
        """A tensor of a shape (None: any size). Raises ModelError for any other."""
        found = self.tensors.get(name)
        fits = found is not None and found.ndim == len(shape)
        if found is None or not fits or any(a not in (b, None) for a, b in zip(shape, found.shape, strict=True)):
            there = "none" if found is None else str(tuple(found.shape))
            raise ModelError(
                f"{who}.calibration: expected {name} of shape {shape}, as this model has it; found {there}"
            )
        return found


class Shelf(NamedTuple):
    """Where the artifacts of a recipe's model lie, and for which weights they must be: find(method, settings) gives the
    path; fingerprint is None while the weights are not there."""

    find: Callable[[str, Mapping[str, Any]], Path]
    fingerprint: Callable[[], str] | None = None


def digest(*parts: Any) -> str:
    """Twelve digits of a hash of values as JSON has them."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint(model: Any) -> str:
    """A hash of a model's weights: of shape, type and a few entries of every one, whatever device they are on."""
    known = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // 16)][:17].double().cpu()
        known.update(f"{name} {tuple(weight.shape)} {some.tolist()}".encode())
    return known.hexdigest()[:12]


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> Path:
    """Keep what was found; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, part, dict(about))
    part.replace(path)
    return path


def read(path: Path, who: str, facts: Facts) -> Artifact:
    """Read an artifact for the method ``who`` of a model. Raises ModelError: missing, unreadable, or another's."""
    if not path.is_file():
        command = f"run `vlm calibrate RECIPE --method {who}` first"
        raise ModelError(f"{who}.calibration: expected what a calibration found, at {path}; found no file; {command}")
    try:
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{who}.calibration: {path} is no safetensors file: {error}") from None
    if about.get("method") != who:
        raise ModelError(f"{who}.calibration: expected a file of {who}; {path.name} is of {about.get('method')}")
    own = None if facts.shelf is None or facts.shelf.fingerprint is None else facts.shelf.fingerprint()
    if own is not None and about.get("weights") != own:
        raise ModelError(
            f"{who}.calibration: expected numbers for this model's weights, {own}; {path.name} is for those of another "
            f"model, {about.get('weights')}"
        )
    return Artifact({name: value.to(torch.float32) for name, value in tensors.items()}, about)
