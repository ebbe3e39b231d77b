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
    """Where what a method must know about a model comes from: ``auto``, a calibration of the recipe's own model, or the
    path of a file that one wrote. A recipe gets it made after training; `vlm calibrate` makes it ahead."""

    where: str = "auto"

    @classmethod
    def parse(cls, value: Any) -> "Calibration":
        """Read a recipe value. Raises ValueError for what is no text."""
        if not isinstance(value, str) or not value:
            raise ValueError(f"must be auto or the path of a calibration's file, found {value!r}")
        return cls(value)

    def __str__(self) -> str:
        return self.where

    def load(self, facts: Facts, who: str, settings: Mapping[str, Any], like: "Artifact", option: str) -> "Artifact":
        """What was calibrated for the method ``who`` with these settings.

        like: something of its form, which a plan gets while ``auto`` has not been made. option: what the recipe calls
        it. Raises ModelError when there is none, naming the command that makes it, or when it is another method's or
        another model's.
        """
        path = self.path(facts, who, settings, option)
        if self == AUTO and facts.shelf is not None and facts.shelf.awaited is not None and not path.is_file():
            facts.shelf.awaited[path] = who
            return like
        return read(path, who, facts, option)

    def path(self, facts: Facts, who: str, settings: Mapping[str, Any], option: str) -> Path:
        """Where the file lies, be it there or not. Raises ModelError for ``auto`` where no recipe says."""
        if self.where != "auto":
            return Path(self.where)
        if facts.shelf is None:
            raise ModelError(f"{who}.{option}: auto belongs to a model of a recipe; give the path of a file")
        return facts.shelf.find(who, settings)


AUTO = Calibration()
ANY = "any"  # in the place of a fingerprint: whoever reads the file has a check of its own


def calibration_of(method: Any) -> tuple[str, Calibration] | None:
    """The option by which a method is calibrated, and its value; None for a method, or settings, without."""
    found = ((name, value) for name, value in vars(method).items() if isinstance(value, Calibration))
    return next(found, None)


class Artifact(NamedTuple):
    """tensors: what was found. about: who found it, for which model and settings, on which data, and how well."""

    tensors: Mapping[str, Tensor]
    about: Mapping[str, str]

    def get(self, name: str, shape: tuple[int | None, ...], who: str, option: str = "calibration") -> Tensor:
        """A tensor of a shape (None: any size). Raises ModelError for any other."""
        found = self.tensors.get(name)
        fits = found is not None and found.ndim == len(shape)
        if found is None or not fits or any(a not in (b, None) for a, b in zip(shape, found.shape, strict=True)):
            there = "none" if found is None else str(tuple(found.shape))
            raise ModelError(f"{who}.{option}: expected {name} of shape {shape}, as this model has it; found {there}")
        return found


class Shelf(NamedTuple):
    """Where the artifacts of a recipe's model lie, and for which weights they must be: find(method, settings) gives the
    path; fingerprint is None while the weights are not there. awaited: for a model that is planned, which learns there
    what file is yet to be made for which method."""

    find: Callable[[str, Mapping[str, Any]], Path]
    fingerprint: Callable[[], str] | None = None
    awaited: dict[Path, str] | None = None


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


def read(path: Path, who: str, facts: Facts, option: str = "calibration") -> Artifact:
    """Read an artifact for the method ``who`` of a model. Raises ModelError: missing, unreadable, or another's."""
    where = f"{who}.{option}"
    if not path.is_file():
        command = f"run `vlm calibrate RECIPE --method {who}` first"
        raise ModelError(f"{where}: expected what a calibration found, at {path}; found no file; {command}")
    found = contents(path, where)
    if found.about.get("method") != who:
        raise ModelError(f"{where}: expected a file of {who}; {path.name} is of {found.about.get('method')}")
    own = None if facts.shelf is None or facts.shelf.fingerprint is None else facts.shelf.fingerprint()
    if own is not None and found.about.get("weights") not in (own, ANY):
        raise ModelError(
            f"{where}: expected numbers for this model's weights, {own}; {path.name} is for those of another model, "
            f"{found.about.get('weights')}"
        )
    return found


def contents(path: Path, where: str) -> Artifact:
    """All that a file holds, floating point in float32. Raises ModelError, which names ``where``, for what is no
    safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{where}: {path} is no safetensors file: {str(error).splitlines()[0]}") from None
    wide = {name: value.to(torch.float32) if value.is_floating_point() else value for name, value in tensors.items()}
    return Artifact(wide, about)
