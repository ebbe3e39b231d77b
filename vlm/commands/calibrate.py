"""``vlm calibrate RECIPE``: find ahead what the recipe's methods must know about its trained model."""

import argparse
from typing import Any

from vlm.commands.recipes import add_recipe, load


def add(commands: Any) -> None:
    text = "find what mitigators with `auto` must know about the trained model, as an evaluation would, and keep it"
    parser = commands.add_parser("calibrate", help=text, description=text)
    add_recipe(parser)
    parser.add_argument("--method", metavar="NAME", help="only this one (all that say auto)")
    parser.add_argument("--source", metavar="NAME", help="of the recipe's data (the first one)")
    parser.add_argument("--samples", type=int, metavar="N", help="how many of the source (by method)")
    parser.set_defaults(call=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> None:
    recipe = load(arguments)
    from vlm.calibrate import calibrate

    for path in calibrate(recipe, arguments.method, arguments.source, arguments.samples):
        print(path)
