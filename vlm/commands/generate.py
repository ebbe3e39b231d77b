"""``vlm generate RECIPE IMAGE PROMPT``: ask the model that a recipe has trained."""

import argparse
from pathlib import Path
from typing import Any

from vlm.commands.recipes import add_overrides, load


def add(commands: Any) -> None:
    text = "ask the trained model of a recipe about an image"
    parser = commands.add_parser("generate", help=text, description=text)
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged recipe")
    parser.add_argument("image", metavar="IMAGE", type=Path)
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="the answer is cut there (64)")
    parser.add_argument("--show", type=Path, metavar="PNG", help="draw where --phrase of the answer looks")
    parser.add_argument("--phrase", metavar="WORDS", help="of the answer; all of it by default")
    add_overrides(parser, "change the recipe, such as prune.use=fastv prune.keep=25%%")
    parser.set_defaults(call=_generate)


def _generate(arguments: argparse.Namespace) -> None:
    recipe = load(arguments)
    from vlm.generate import generate

    shown = {} if arguments.show is None else {"show": arguments.show, "phrase": arguments.phrase}
    print(generate(recipe, arguments.image, arguments.prompt, max_new_tokens=arguments.max_new_tokens, **shown))
