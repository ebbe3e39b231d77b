"""``vlm calibrate RECIPE``: find what the recipe's methods must know about its trained model."""

import argparse
from typing import Any

from vlm.commands.recipes import add_recipe, load


def add(commands: Any) -> None:
    text = "find what mitigators with `calibration: auto` must know about the trained model, and keep it in the run"
    parser = commands.add_parser("calibrate", help=text, description=text)
    add_recipe(parser)
    parser.add_argument("--method", metavar="NAME", help="only this one (all that say calibration: auto)")
    parser.add_argument("--source", metavar="NAME", help="of the recipe's data (the first one)")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="how many of the source (64)")
    parser.set_defaults(call=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> None:
    recipe = load(arguments)
    from vlm.calibrate import calibrate

    for path in calibrate(recipe, arguments.method, arguments.source, arguments.samples):
        print(path)
