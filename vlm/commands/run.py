"""``vlm run RECIPE`` and its parts: ``train``, ``evaluate``, ``report``."""

import argparse
from pathlib import Path
from typing import Any

from vlm.commands.recipes import add_recipe, load

_PARTS = {
    "run": ("everything the recipe says: data, training, evaluation, report", ("data", "train", "evaluate", "report")),
    "train": ("make the data if the recipe makes them, and train", ("data", "train")),
    "evaluate": ("evaluate what was trained", ("evaluate",)),
}


def add(commands: Any) -> None:
    for name, (text, parts) in _PARTS.items():
        parser = commands.add_parser(name, help=text, description=text)
        add_recipe(parser)
        parser.set_defaults(call=_run, parts=parts)
    text = "write the report of what was trained and evaluated"
    parser = commands.add_parser("report", help=text, description=text)
    add_recipe(parser)
    parser.set_defaults(call=_report)


def _run(arguments: argparse.Namespace) -> None:
    recipe = load(arguments)
    from vlm.run import run

    run(recipe, arguments.parts)


def _report(arguments: argparse.Namespace) -> None:
    from vlm.recipe import load_recipe
    from vlm.report import write_report

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    print(f"Report: {write_report(Path(recipe.run.dir))}")
