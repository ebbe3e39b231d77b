"""Writing, finding, checking and reading checkpoints."""

import copy
import hashlib
import os
import re
import struct
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from lightning.pytorch.plugins import CheckpointIO
from torch import Tensor

from vlm.models.base import BaseVlm
from vlm.models.lora import is_adapter
from vlm.recipe import Recipe, RecipeError
from vlm.recipe.load import check as check_tree
from vlm.recipe.tree import parse, stamp
from vlm.training.errors import TrainingError

NAME = re.compile(r"stage(\d+)-(.+)-step(\d{8})\.ckpt")
# What torch raises for broken files, depending on where they are broken.
DAMAGED = (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError, struct.error)
NEEDED = ("state_dict", "recipe", "loops", "global_step")


class Files(CheckpointIO):
    """How Lightning's checkpoints go to disk and come from it.

    Written beside their place, down to the disk, and renamed: there is the whole file or none. Lightning calls this
    on the first rank only, so what went wrong is kept in ``failure`` for all ranks to stop together; it is known after
    :meth:`wait`.

    Args:
        background: write in a thread of its own, from a copy in the host's memory, while training goes on.
    """

    def __init__(self, background: bool = False) -> None:
        self.background, self.failure = background, ""
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.wait()
        if self._thread is None:
            self._save(checkpoint, Path(path))
        else:
            self._writing = self._thread.submit(self._save, snapshot(checkpoint), Path(path))

    def wait(self) -> None:
        """Until what is being written lies on the disk, or has failed. Raises what is no fault of the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _save(self, checkpoint: dict[str, Any], path: Path) -> None:
        part = path.with_suffix(".partial")
        self.failure = ""
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            _write(checkpoint, part)
            part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            self.failure = error.strerror or str(error)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def snapshot(value: Any, seen: dict[tuple[Any, ...], Tensor] | None = None) -> Any:
    """A copy in the host's memory that no later step changes; tensors that are one (tied weights) stay one."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() == 0 or key not in seen:
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, dict):
        return {key: snapshot(each, seen) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([snapshot(each, seen) for each in value])
    return copy.deepcopy(value)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # of torch's writer, after the file's own
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class Checkpoint(NamedTuple):
    """A checkpoint file: ``step`` steps of stage number ``stage`` are done."""

    path: Path
    stage: int
    step: int


def newest(folder: Path) -> Checkpoint | None:
    """The checkpoint that is farthest on, or None."""
    found = [(path, NAME.fullmatch(path.name)) for path in folder.glob("*.ckpt")]
    points = [Checkpoint(path, int(match[1]), int(match[3])) for path, match in found if match]
    return max(points, key=lambda point: (point.stage, point.step), default=None)


def point_of(path: Path, key: str = "run.resume") -> Checkpoint:
    """The checkpoint at ``path``, which the recipe's ``key`` names. Raises TrainingError when there is none or its name
    says no stage and step."""
    match = NAME.fullmatch(path.name)
    if not path.is_file() or match is None:
        raise TrainingError(f"{key}: expected a checkpoint stage<i>-<name>-step<n>.ckpt; found {path}")
    return Checkpoint(path, int(match[1]), int(match[3]))


def of_run(path: Path, key: str) -> Path:
    """The checkpoint that the recipe's ``key`` means: the file itself, or the newest of a run's folder.

    Raises TrainingError when there is none.
    """
    if path.suffix == ".ckpt":
        return point_of(path, key).path
    point = newest(path / "checkpoints")
    if point is None:
        raise TrainingError(
            f"{path / 'checkpoints'}: expected a checkpoint of this run, found none; train that run first, or set "
            f"{key}=null"
        )
    return point.path


def forget_after(point: Checkpoint, folder: Path) -> None:
    """Remove what a run that goes on from ``point`` will write anew, and what a kill left half-written.

    Checkpoints of later steps would pass for the newest ones, and those being written for old.
    """
    for path in folder.glob("*.ckpt"):
        match = NAME.fullmatch(path.name)
        if match and (int(match[1]), int(match[3])) > (point.stage, point.step):
            path.unlink()
    for path in folder.glob("*.partial"):
        path.unlink()


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint: tensors and plain values only, no code is run. Raises TrainingError if broken."""
    try:
        content = _load(path)
    except UnpicklingError:
        raise TrainingError(
            f"checkpoint {path} cannot be read: expected tensors and plain values, found other objects or damage;"
            " none of it was run"
        ) from None
    except DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(f"checkpoint {path} cannot be read: {reason}") from None
    missing = [key for key in NEEDED if not isinstance(content, dict) or key not in content]
    if missing:
        raise TrainingError(f"checkpoint {path}: expected one of a run of this project, found no {missing[0]!r} in it")
    return content


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        if file.read(2) != b"PK":  # torch would go on to read its older formats
            raise ValueError("expected a zip archive of torch, found no zip")
    return torch.load(path, map_location="cpu", weights_only=True)


def check_recipe(content: dict[str, Any], path: Path, identity: dict[str, Any]) -> None:
    """Refuse a checkpoint of another recipe, naming the first keys that differ. A key that was not there yet when
    it was written counts as its default.

    Raises TrainingError: what the checkpoint was trained with and what this recipe says.
    """
    recipe = content["recipe"]
    saved = recipe.get("identity") if isinstance(recipe, dict) else None
    if saved == identity:
        return
    if saved is None:
        raise TrainingError(f"checkpoint {path} holds no recipe; expected one that this project wrote")
    saved = _read_today(recipe["resolved"], path, saved)
    if saved == identity:
        return
    differences = [
        key for key in sorted({*flat(saved), *flat(identity)}) if flat(saved).get(key) != flat(identity).get(key)
    ]
    key = differences[0]
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    raise TrainingError(
        f"checkpoint {path} belongs to another recipe: expected {key} = {flat(identity).get(key)!r}, "
        f"found {flat(saved).get(key)!r}{more}; choose another run.dir or run.resume=never"
    )


def _read_today(resolved: str, path: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """The identity of a recipe as it would be written today; as it was ``saved`` where today's keys are others."""
    try:
        return check_tree(stamp(parse(resolved, path.name)), path.name).identity()
    except RecipeError:
        return saved


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested value as dotted keys."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if items is None:
        return {prefix[:-1]: tree}
    return {key: value for name, part in items for key, value in flat(part, f"{prefix}{name}.").items()}


def untrained(recipe: Recipe, model: BaseVlm) -> frozenset[str]:
    """Weights of a model ``from`` a checkpoint that no stage trains, by name; none of a composed model.

    Checkpoints of ours leave them out: they are gigabytes that lie where they came from.
    """
    if recipe.model.origin is None:
        return frozenset()
    trained = {(role, how.lora is not None) for stage in recipe.stages for role, how in stage.train.items()}
    found = set()
    for name in model.state_dict():
        role = next(role for role, part in model.parts.items() if part.owns(name))
        if (role, is_adapter(name)) not in trained:
            found.add(name)
    return frozenset(found)


def fingerprint(model: BaseVlm, names: Iterable[str]) -> str:
    """A hash of a few numbers of each of these weights: other weights under the same name are told apart."""
    state, digest = model.state_dict(), hashlib.sha256()
    for name in sorted(names):
        flat = state[name].flatten()
        some = flat[:: max(1, len(flat) // 16)].float().cpu()
        digest.update(f"{name} {tuple(state[name].shape)} {some.tolist()}".encode())
    return digest.hexdigest()


def load_weights(model: BaseVlm, content: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into ``model``.

    Raises TrainingError listing keys when it does not fit, or when what it leaves out is not what it was trained on.
    """
    state = {
        key.removeprefix("model."): value for key, value in content["state_dict"].items() if key.startswith("model.")
    }
    own, base = model.state_dict(), content.get("base")
    missing = {*own} - {*state}
    wrong = {*state} - {*own} | {key for key in {*state} & {*own} if state[key].shape != own[key].shape}
    wrong |= missing if base is None else set()
    if wrong:
        raise TrainingError(f"checkpoint {path} does not fit the model: {len(wrong)} keys differ, first {min(wrong)}")
    if base is not None and base != fingerprint(model, missing):
        raise TrainingError(
            f"checkpoint {path} goes on top of the weights of model.from: expected those it was trained on, found "
            "others under that name"
        )
    model.load_state_dict(state, strict=base is None)


def load_start(model: BaseVlm, content: dict[str, Any], path: Path) -> None:
    """Put the weights of another run's checkpoint into ``model``, whose fresh adapters stay as they are.

    Raises TrainingError when they are not those of this model, or have adapters or a base of their own.
    """
    own = model.state_dict()
    renamed = {f"model.{name.replace('.base_layer.', '.')}": f"model.{name}" for name in own if not is_adapter(name)}
    state = {renamed.get(name, name): value for name, value in content["state_dict"].items()}
    if content.get("base") is not None or any(is_adapter(str(name)) for name in state):
        raise TrainingError(f"checkpoint {path}: model.weights takes a composed model without adapters; found others")
    adapters = {f"model.{name}": value for name, value in own.items() if is_adapter(name)}
    load_weights(model, {"state_dict": {**state, **adapters}}, path)
