"""``vlm export RECIPE FOLDER``: write what was trained for other programs."""

import argparse
from pathlib import Path
from typing import Any

from vlm.commands.recipes import add_overrides, load


def add(commands: Any) -> None:
    text = "write the trained model of a recipe into a folder, adapters merged: for Transformers, or as one of ours"
    parser = commands.add_parser("export", help=text, description=text)
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged recipe")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="an empty folder, or none yet")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load it back on the CPU and compare logits with the run's model (default); memory for two models",
    )
    add_overrides(parser, "change the recipe, such as run.dir=runs/other")
    parser.set_defaults(call=_export)


def _export(arguments: argparse.Namespace) -> None:
    recipe = load(arguments)
    from vlm.export import export

    said = export(recipe, arguments.folder, arguments.verify)
    print(f"{arguments.folder}: {said}")
