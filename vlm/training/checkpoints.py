"""Finding, checking and reading checkpoints."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlm.models.vision_language import VisionLanguageModel
from vlm.training.errors import TrainingError

NAME = re.compile(r"stage(\d+)-(.+)-step(\d{8})\.ckpt")


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


def point_of(path: Path) -> Checkpoint:
    """The checkpoint at ``path``. Raises TrainingError when there is none or its name says no stage and step."""
    match = NAME.fullmatch(path.name)
    if not path.is_file() or match is None:
        raise TrainingError(f"run.resume: expected a checkpoint stage<i>-<name>-step<n>.ckpt; found {path}")
    return Checkpoint(path, int(match[1]), int(match[3]))


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
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(f"checkpoint {path} cannot be read: {reason}") from None


def check_recipe(content: dict[str, Any], path: Path, identity: dict[str, Any]) -> None:
    """Refuse a checkpoint of another recipe, naming the first keys that differ.

    Raises TrainingError: what the checkpoint was trained with and what this recipe says.
    """
    saved = content.get("recipe", {}).get("identity")
    if saved == identity:
        return
    if saved is None:
        raise TrainingError(f"checkpoint {path} holds no recipe; expected one that this project wrote")
    differences = [
        key for key in sorted({*flat(saved), *flat(identity)}) if flat(saved).get(key) != flat(identity).get(key)
    ]
    key = differences[0]
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    raise TrainingError(
        f"checkpoint {path} belongs to another recipe: expected {key} = {flat(identity).get(key)!r}, "
        f"found {flat(saved).get(key)!r}{more}; choose another run.dir or run.resume=never"
    )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested value as dotted keys."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if items is None:
        return {prefix[:-1]: tree}
    return {key: value for name, part in items for key, value in flat(part, f"{prefix}{name}.").items()}


def load_weights(model: VisionLanguageModel, content: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into ``model``. Raises TrainingError listing keys when it does not fit."""
    state = {
        key.removeprefix("model."): value for key, value in content["state_dict"].items() if key.startswith("model.")
    }
    own = model.state_dict()
    wrong = sorted({*state} ^ {*own} | {key for key in {*state} & {*own} if state[key].shape != own[key].shape})
    if wrong:
        raise TrainingError(f"checkpoint {path} does not fit the model: {len(wrong)} keys differ, first {wrong[0]}")
    model.load_state_dict(state)
