"""``run.log``: where numbers of training go besides metrics.jsonl. Each needs a package that is installed on wish."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlm.recipe import Recipe
from vlm.training.errors import TrainingError

Log = Callable[[int, dict[str, Any]], None]


def check_loggers(names: Sequence[str]) -> None:
    """Raises TrainingError for one whose package is not there, before anything runs."""
    for name in names:
        if find_spec(name) is None:
            raise TrainingError(
                f"run.log: {name} is not installed; pip install 'vlm-recipes[{name}]', or leave it out of run.log"
            )


def open_loggers(recipe: Recipe, stage: str, done: int) -> list[Log]:
    """Functions of a step and its numbers. Steps count within the stage, from ``done`` on in a resumed run."""
    check_loggers(recipe.run.log)
    folder = Path(recipe.run.dir)
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    return [makers[name](recipe, folder, stage, done) for name in recipe.run.log]


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    """The curves of a line of metrics.jsonl by name; learning rates as ``lr/<part>``."""
    flat = {key: value for key, value in entry.items() if isinstance(value, int | float)}
    rates = {f"lr/{part}": rate for part, rate in entry.get("lr", {}).items()}
    return {key: float(value) for key, value in (flat | rates).items() if key not in ("stage", "step", "steps")}


def _tensorboard(recipe: Recipe, folder: Path, stage: str, done: int) -> Log:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard" / stage), purge_step=done)

    def log(step: int, entry: dict[str, Any]) -> None:
        for name, value in numbers(entry).items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _wandb(recipe: Recipe, folder: Path, stage: str, done: int) -> Log:
    import wandb  # pyright: ignore[reportMissingImports]

    # One run of W&B per run folder and identity, which a resumed run goes on with.
    name = f"{recipe.name}-{recipe.identity_hash()[:8]}"
    run = wandb.run  # of the stage before
    if run is None or run.id != name:
        run = wandb.init(dir=str(folder), project="vlm", name=name, id=name, resume="allow", config=recipe.plain())

    def log(step: int, entry: dict[str, Any]) -> None:
        run.log({f"{stage}/{key}": value for key, value in numbers(entry).items()} | {f"{stage}/step": step})

    return log
