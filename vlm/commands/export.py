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
    add_overrides(parser, "change the recipe, such as run.dir=runs/other")
    parser.set_defaults(call=_export)


def _export(arguments: argparse.Namespace) -> None:
    recipe = load(arguments)
    from vlm.export import export

    export(recipe, arguments.folder)
    print(arguments.folder)
