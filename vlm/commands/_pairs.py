"""``vlm data make-pairs RECIPE``: preference pairs from a trained model's own answers."""

import argparse
from pathlib import Path
from typing import Any

from vlm.commands.recipes import add_recipe, load


def add_make_pairs(actions: Any) -> None:
    text = "answers of a recipe's trained model to its data as preference pairs: one to prefer, one to avoid"
    parser = actions.add_parser("make-pairs", help=text, description=text)
    add_recipe(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for the shards")
    parser.add_argument("--source", metavar="NAME", help="of the recipe's data (the first)")
    how = "a row as in evaluate.compare, {} for the model alone, or no-image"
    parser.add_argument("--chosen", default="{mitigate: {use: m3id}}", metavar="ROW", help=f"{how} (%(default)s)")
    parser.add_argument("--rejected", default="no-image", metavar="ROW", help=f"{how} (%(default)s)")
    parser.add_argument("--samples", type=int, metavar="N", help="so many of the source, drawn with --seed (all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (0)")
    parser.add_argument("--prompt", metavar="TEXT", help="asked of every image in place of the sample's own question")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="an answer is cut there (64)")
    parser.set_defaults(call=_make_pairs)


def _make_pairs(arguments: argparse.Namespace) -> None:
    recipe = load(arguments)
    from vlm.pairs import Pairs, read_side
    from vlm.recipe import RecipeError

    for name, value in (("samples", arguments.samples), ("max-new-tokens", arguments.max_new_tokens)):
        if value is not None and value < 1:
            raise RecipeError(f"--{name}: expected at least 1; found {value}")
    if not recipe.data.sources:
        raise RecipeError(f"{arguments.recipe}: data.sources is empty, so there is nothing to ask about")
    source = arguments.source or next(iter(recipe.data.sources))
    sides = (read_side(arguments.chosen, "--chosen"), read_side(arguments.rejected, "--rejected"))
    pairs = Pairs(
        recipe,
        source,
        *sides,
        samples=arguments.samples,
        seed=arguments.seed,
        prompt=arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
    )
    manifest = pairs.write(arguments.out)
    left = f"; left out: {pairs.equal} with equal answers, {pairs.empty} with an empty one"
    print(f"{arguments.out}: {len(manifest)} pairs in {len(manifest.shards)} shards{left}")
