"""A composed model in a folder: ``config.json`` (its parts, its recipe), weights as safetensors, the tokenizer.

Reading runs no code of the folder's: parts are named and looked up among ours and those of installed packages, weights
are safetensors.
"""

import inspect
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from vlm.models.errors import ModelError
from vlm.models.language import build_language, load_tokenizer
from vlm.models.lora import merged
from vlm.models.part import Part
from vlm.models.vision_language import VisionLanguageModel

MODEL_TYPE = "vlm_composed"
CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
_FOLDERS = {"vision": "backbones", "connector": "connectors"}
_WIDTHS = ("vision_dim", "language_dim")  # of a connector, from the other two parts
_SHOWN = 8  # keys of each kind that a message lists


class Saved(NamedTuple):
    """What a folder holds; the tokenizer is None where none was saved, the recipe is empty where none was given."""

    model: VisionLanguageModel
    tokenizer: PreTrainedTokenizerBase | None
    recipe: str


def save_composed(
    model: VisionLanguageModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    recipe: str = "",
) -> None:
    """Write ``model`` so that :func:`load_composed` makes an equal one; there is the whole folder or none.

    Keys are those of ``model.state_dict()``; what is tied is written once. Above 5 GB weights are split into files with
    an index, as Transformers does. ``recipe`` is its text. A folder that holds a saved model is replaced.

    Adapters are merged into what is written.

    Raises ModelError for a part that cannot be described, or a folder with something else in it.
    """
    place, model = Path(folder), merged(model)
    taken = place.exists() and (not place.is_dir() or any(place.iterdir()))
    if taken and _read_config(place).get("model_type") != MODEL_TYPE:
        raise ModelError(f"save: {place} holds something else; expected an empty folder or a saved composed model")
    language: Any = model.language
    config = {
        "model_type": MODEL_TYPE,
        "vision": _describe("vision", model.vision),
        "connector": _describe("connector", model.connector),
        "language": json.loads(language.config.to_json_string(use_diff=False)),
        "max_tiles": model.max_tiles,
        "newline": model.newline is not None,
        "recipe": recipe,
    }
    part = place.with_name(place.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_torch_state_dict(model.state_dict(), part)
    if tokenizer is not None:
        tokenizer.save_pretrained(part)
    shutil.rmtree(place, ignore_errors=True)
    part.replace(place)


def load_composed(folder: str | os.PathLike[str]) -> Saved:
    """The model of a folder that :func:`save_composed` wrote, in eval mode, with the types of its weights.

    Raises ModelError when the folder holds none, names a part that is not installed, or its weights do not fit.
    """
    place = Path(folder)
    config = _read_config(place)
    if config.get("model_type") != MODEL_TYPE:
        found = repr(config["model_type"]) if "model_type" in config else "no such folder or config.json"
        raise ModelError(f"load: {place}: expected a saved composed model, of type {MODEL_TYPE!r}; found {found}")
    if missing := [key for key in ("vision", "connector", "language") if not isinstance(config.get(key), dict)]:
        raise ModelError(
            f"load: {place / CONFIG}: expected parts vision, connector and language; found no {missing[0]}"
        )
    vision = _make("vision", config["vision"])
    language = build_language(config["language"], 0)
    widths = {"vision_dim": vision.dim, "language_dim": language.config.hidden_size}
    connector = _make("connector", config["connector"], **widths)
    tiles, newline = int(config.get("max_tiles", 0)), bool(config.get("newline", False))
    model = VisionLanguageModel(vision, connector, language, tiles, newline)
    weights = _open(place)
    own = model.state_dict(keep_vars=True)
    _check_keys(place, own, weights)
    for key, value in own.items():
        value.data = value.data.to(weights[key].dtype) if key in weights else value.data
    _copy(own, weights)
    tokenizer = load_tokenizer(str(place)) if (place / "tokenizer_config.json").exists() else None
    return Saved(model.eval(), tokenizer, str(config.get("recipe", "")))


def load_weights(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Put the weights of a saved model into ``model``, in the types it has.

    Raises ModelError that lists keys which are missing, unexpected or of another shape; nothing is loaded then.
    """
    weights, own = _open(Path(folder)), model.state_dict(keep_vars=True)
    _check_keys(Path(folder), own, weights)
    _copy(own, weights)


class _Weight(NamedTuple):
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def _open(folder: Path) -> dict[str, _Weight]:
    """Every tensor in the folder's files, which are looked at but not read."""
    names = [WEIGHTS]
    if (folder / INDEX).exists():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    found: dict[str, _Weight] = {}
    for file in (folder / Path(name).name for name in names):
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  (the file is no mapping)
                    part = tensors.get_slice(key)
                    found[key] = _Weight(file, tuple(part.get_shape()), _TYPES[part.get_dtype()])
        except (SafetensorError, OSError, KeyError) as error:
            raise ModelError(f"load: {file} cannot be read: {str(error).splitlines()[0]}") from None
    return found


_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _check_keys(folder: Path, own: Mapping[str, torch.Tensor], weights: Mapping[str, _Weight]) -> None:
    there = {own[key].data_ptr() for key in weights if key in own}
    wrong = {
        "missing": [key for key in own if key not in weights and own[key].data_ptr() not in there],
        "unexpected": [key for key in weights if key not in own],
        "of another shape": [
            f"{key} (expected {tuple(own[key].shape)}, found {weight.shape})"
            for key, weight in weights.items()
            if key in own and weight.shape != tuple(own[key].shape)
        ],
    }
    shown = [f"{len(keys)} {what}: {_listed(keys)}" for what, keys in wrong.items() if keys]
    if shown:
        raise ModelError(f"load: the weights in {folder} do not fit the model; {'; '.join(shown)}")


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


@torch.no_grad()
def _copy(own: Mapping[str, torch.Tensor], weights: Mapping[str, _Weight]) -> None:
    for file in dict.fromkeys(weight.file for weight in weights.values()):
        with safe_open(file, "pt") as tensors:
            for key, weight in weights.items():
                if weight.file == file:
                    own[key].copy_(tensors.get_tensor(key))


def _read_config(folder: Path) -> dict[str, Any]:
    """The folder's config, empty where there is none that can be read."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _describe(kind: str, part: Any) -> dict[str, Any]:
    """``{use, **options}``, as a recipe would write it. Raises ModelError for a part that options cannot say."""
    name = next((name for name, found in _known(kind, type(part).__module__) if found is type(part)), None)
    if name is None or not isinstance(part, Part):
        raise ModelError(f"save: {type(part).__name__} is no {kind} part that a recipe can name, so it cannot be saved")
    return {"use": name} | {
        option: _plain(f"{name}.{option}", value) for option, value in part.options().items() if option not in _WIDTHS
    }


def _plain(where: str, value: Any) -> Any:
    """A value as JSON has it; modules are parts in turn."""
    if isinstance(value, nn.Module):
        return _describe("vision", value)
    if isinstance(value, list | tuple | nn.ModuleList):
        return [_plain(where, item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(where, item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ModelError(f"save: {where} is of type {type(value).__name__}, which config.json cannot hold")


def _make(kind: str, described: Mapping[str, Any], **given: Any) -> Any:
    """The part that ``{use, **options}`` describes, with random weights."""
    use = str(described.get("use"))
    target = dict(_known(kind, use)).get(use)
    if target is None:
        raise ModelError(f"load: {kind} {use!r} is none of ours and of no installed package")
    known = inspect.signature(target).parameters
    options = {key: _remade(value) for key, value in described.items() if key != "use"}
    if unknown := [key for key in options if key not in known]:
        raise ModelError(f"load: {kind} {use} has options {', '.join(known)}; found {unknown[0]!r}")
    return target(**options, **given)


def _remade(value: Any) -> Any:
    """A description, or a list of them, becomes what it describes: an encoder."""
    if isinstance(value, list):
        return [_remade(item) for item in value]
    return _make("vision", value) if isinstance(value, dict) and "use" in value else value


def _known(kind: str, name: str) -> Sequence[tuple[str, Any]]:
    """(name, class) of our file that ``name`` or a module's name means, and of every installed package's part."""
    stem = name.rpartition(".")[2]
    folder, found = _FOLDERS[kind], []
    if stem in {path.stem for path in Path(__file__).with_name(folder).glob("[!_]*.py")}:
        module = import_module(f"vlm.models.{folder}.{stem}")
        classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        found = [(stem, c) for c in classes if "source" in vars(c)]
    return [*found, *((point.name, point.load()) for point in entry_points(group=f"vlm.{kind}"))]
