"""``vlm plan RECIPE``: what it would do, without doing it."""

import argparse
from typing import Any

from vlm.commands.recipes import add_recipe, load


def add(commands: Any) -> None:
    text = "what the recipe would do: parts, tokens, cost, batches, contradictions; needs no GPU and makes nothing"
    parser = commands.add_parser("plan", help=text, description=text)
    add_recipe(parser)
    parser.add_argument("--resolved", action="store_true", help="print the resolved recipe instead")
    parser.add_argument("--gpu", metavar="NAME", help="tell the hours on this GPU, such as h100 or a100")
    parser.set_defaults(call=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    recipe = load(arguments)
    if arguments.resolved:
        print(recipe.to_yaml(), end="")
        return
    from vlm.plan import plan

    print(plan(recipe, arguments.gpu))
