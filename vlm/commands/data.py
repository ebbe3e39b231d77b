"""``vlm data make | pack | make-pairs | index | check | show | score``: shards made, converted, indexed, checked and
looked at, and answers of elsewhere scored."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.commands._pairs import add_make_pairs
from vlm.commands.recipes import add_overrides, add_recipe, load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlm.data.batch import Example
    from vlm.data.schema import Sample
    from vlm.recipe import Method, Recipe

# The word on the command line -> the reader `read_<word>` in the importer of that name.
_FORMATS = {
    "llava-json": "LLaVA's JSON or JSON lines with its image folder",
    "coco-captions": "COCO captions JSON with its image folder",
    "rlhf-v": "preference pairs: question, chosen, rejected and an image, as JSON, JSON lines or parquet",
}


def add(commands: Any) -> None:
    text = "make, convert, index, check and look at shards; score answers that something else wrote"
    data = commands.add_parser("data", help=text, description=text)
    actions = data.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    making = (_add_make, _add_pack, add_make_pairs, _add_index, _add_index_captions)
    for add_action in (*making, _add_check, _add_show, _add_score):
        add_action(actions)


def _add_make(actions: Any) -> None:
    text = "make the data of a recipe, or of a maker (scenes) with its own options; done already is done"
    parser = actions.add_parser("make", help=text, description=text)
    parser.add_argument("recipe", metavar="RECIPE|MAKER", help="a recipe, or a maker such as scenes")
    add_overrides(parser, "change the recipe; after a maker its options, such as folder=data/scenes train=1000")
    parser.set_defaults(call=_make)


def _make(arguments: argparse.Namespace) -> None:
    from vlm.create import create, names
    from vlm.recipe import RecipeError

    if arguments.recipe in names("make") and not Path(arguments.recipe).is_file():
        method = _maker(arguments.recipe, arguments.overrides)
    else:
        method = load(arguments).data.make
        if method is None:
            raise RecipeError(f"{arguments.recipe}: data.make is not set, so there is nothing to make")
    create("make", method, check_only=True)
    print(create("make", method, progress=_Ticker("make data")))


def _maker(name: str, options: list[str]) -> "Method":
    """A maker with the options of the packaged recipe of its name, where there is one, and those given over them."""
    from vlm.recipe import Method, load_recipe
    from vlm.recipe.load import packaged_folder, read_words

    given = read_words(options)
    packaged = packaged_folder() / f"{name}.yaml"
    usual = load_recipe(packaged).data.make if packaged.is_file() else None
    if usual is not None and usual.use == name:
        kept = {key: value for key, value in usual.options.items() if key not in given}
        return Method.model_validate({"use": name, **kept, **given})
    return Method.model_validate({"use": name, **given})


class _Ticker:
    """Shows progress from the first call on, which is when the total is known."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.progress: Any = None

    def __call__(self, done: int, total: int) -> None:
        from vlm.progress import Progress

        self.progress = self.progress or Progress(self.title, total)
        self.progress.update(done)


def _add_pack(actions: Any) -> None:
    text = "convert a data set that you have into shards"
    parser = actions.add_parser("pack", help=text, description=text)
    parser.add_argument("format", metavar="FORMAT", choices=_FORMATS, help=", ".join(_FORMATS))
    parser.add_argument("file", metavar="FILE", type=Path, help="the annotations")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="the folder of the images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for the shards")
    add_overrides(parser, "options of the format, such as on_bad=skip")
    parser.set_defaults(call=_pack)


def _pack(arguments: argparse.Namespace) -> None:
    from importlib import import_module

    from vlm.create import read_options
    from vlm.data.write import write_shards
    from vlm.recipe import Method
    from vlm.recipe.load import read_words

    module = arguments.format.replace("-", "_")
    read = getattr(import_module(f"vlm.data.importers.{module}"), f"read_{module}")
    method = Method.model_validate({"use": arguments.format, **read_words(arguments.overrides)})
    options = read_options(read, method, filled_in=("annotations", "images"))
    manifest = write_shards(read(arguments.file, arguments.images, **options), arguments.out)
    print(f"{arguments.out}: {len(manifest)} samples in {len(manifest.shards)} shards")


def _add_index(actions: Any) -> None:
    text = "index shards, and write the manifest of each folder"
    parser = actions.add_parser("index", help=text, description=text)
    parser.add_argument("paths", metavar="PATH", nargs="+", help="shards, folders or patterns of them")
    parser.set_defaults(call=_index)


def _index(arguments: argparse.Namespace) -> None:
    from vlm.data.index import build_index

    manifest = build_index(arguments.paths)
    print(f"{len(manifest)} samples in {len(manifest.shards)} shards, hash {manifest.hash[:12]}")


def _add_index_captions(actions: Any) -> None:
    text = "index a folder of pictures (each with a .txt of its name), for the mitigator ara"
    parser = actions.add_parser("index-captions", help=text, description=text)
    parser.add_argument("recipe", metavar="RECIPE", help="whose trained model sees the pictures")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path, help="a .safetensors file")
    add_overrides(parser, "change the recipe")
    parser.set_defaults(call=_index_captions)


def _index_captions(arguments: argparse.Namespace) -> None:
    recipe = load(arguments)
    from vlm.captions import index_captions

    count = index_captions(recipe, arguments.folder, arguments.out)
    print(f"{arguments.out}: {count} captions")


def _add_check(actions: Any) -> None:
    text = "find everything wrong with shards; exit code 1 with one line per problem"
    parser = actions.add_parser("check", help=text, description=text)
    parser.add_argument("paths", metavar="PATH", nargs="+", help="shards, folders or patterns of them")
    parser.set_defaults(call=_check)


def _check(arguments: argparse.Namespace) -> int:
    from vlm.data.check import check

    problems = check(arguments.paths)
    for problem in problems:
        print(" ".join(str(problem).splitlines()))
    return 1 if problems else 0


def _add_score(actions: Any) -> None:
    text = "score a file of answers, whoever wrote it, against the files of a benchmark; no model and no images needed"
    parser = actions.add_parser("score", help=text, description=text)
    parser.add_argument("benchmark", metavar="BENCHMARK", help="a benchmark such as pope; vlm methods lists them")
    parser.add_argument("file", metavar="FILE", type=Path, help="answers by question: JSON, JSON lines, or official")
    add_overrides(parser, "options of the benchmark, such as questions=[coco_pope_random.json] images=val2014")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="answers to compare with, question by question")
    parser.add_argument("--any-order", action="store_true", help="take answers in another order than the questions")
    parser.add_argument("--id-key", metavar="KEY", help="the field of a record that holds the question's id")
    parser.add_argument("--answer-key", metavar="KEY", help="the field of a record that holds the answer")
    parser.add_argument("--requests", type=Path, metavar="FILE", help="write what a judge is to be asked, and stop")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write numbers and protocol as JSON")
    parser.set_defaults(call=_score)


def _score(arguments: argparse.Namespace) -> None:
    import json

    from vlm.create import create
    from vlm.data.benchmarks._shared.judge import write_requests
    from vlm.data.benchmarks._shared.predictions import read_answers, score_file
    from vlm.recipe import Method, RecipeError
    from vlm.recipe.load import read_words

    given = {"images": "", **read_words(arguments.overrides)}  # answers are there, so pictures need not be
    benchmark = create("benchmark", Method.model_validate({"use": arguments.benchmark, **given}))
    how = {"id_key": arguments.id_key, "answer_key": arguments.answer_key, "any_order": arguments.any_order}
    if arguments.requests:
        if not hasattr(benchmark, "judge_requests"):
            raise RecipeError(f"--requests: {arguments.benchmark} has no judge")
        requests = benchmark.judge_requests(read_answers(benchmark, arguments.file, **how))
        write_requests(requests, arguments.requests)
        print(f"{arguments.requests}: {len(requests)} requests; replies go into JSON lines of id and reply")
        return
    found = score_file(benchmark, arguments.file, **how)
    record = found.to_dict()
    if arguments.baseline:
        before = read_answers(benchmark, arguments.baseline, **how)
        record["change"] = benchmark.compare(before, read_answers(benchmark, arguments.file, **how))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for line in _lines(arguments.benchmark, record):
        print(line)


def _lines(benchmark: str, record: dict[str, Any]) -> "Iterator[str]":
    """What is said of a scored file: numbers by group, changes by group, then what to know about the answers."""
    for group, values in record["scores"].items():
        numbers = [
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in values.items()
            if isinstance(value, int | float)
        ]
        low, high = values["ci"]
        numbers.insert(1, f"(95 %: {low:.4f} to {high:.4f})")
        yield f"{benchmark} {group}".rstrip() + f": {', '.join(numbers).replace(', (', ' (', 1)}"
        yield from (f"  {warning}" for warning in values.get("warnings", ()))
    for group, changes in record.get("change", {}).items():
        for name, change in changes.items():
            low, high = change["ci"]
            yield (
                f"{benchmark} {group}".rstrip() + f": {name} changes by {change['difference']:+.4f} "
                f"(95 %: {low:+.4f} to {high:+.4f}, p {change['p']:.3g})"
            )
    if empty := sum(record["empty"].values()):
        yield f"{empty} of {record['n']} answers are empty"
    if missing := record["missing_images"]:
        yield f"{len(missing)} images are missing: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}"


def _add_show(actions: Any) -> None:
    text = "an HTML page of samples as the model gets them: template, masking, what is learned in colour"
    parser = actions.add_parser("show", help=text, description=text)
    add_recipe(parser)
    parser.add_argument("--samples", type=int, default=12, metavar="N", help="of each source (12)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (samples.html in the run's folder)")
    parser.set_defaults(call=_show)


def _show(arguments: argparse.Namespace) -> None:
    recipe = load(arguments)
    from vlm.build import build_encoder, build_model, build_tokenizer
    from vlm.data.show import show

    tokenizer = build_tokenizer(recipe)
    encoder = build_encoder(recipe, build_model(recipe, tokenizer, meta=True), tokenizer)
    page = show(_samples(recipe, encoder, arguments.samples), encoder, f"Samples of {recipe.name}")
    out = arguments.out or Path(recipe.run.dir) / "samples.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    print(out)


def _samples(recipe: "Recipe", encoder: Any, count: int) -> list[tuple["Sample", "Example"]]:
    """``count`` samples of every source, evenly spread over it, each with what the encoder makes of it."""
    from vlm.data.draw import Draw
    from vlm.data.index import load_manifest
    from vlm.data.pairs import PairEncoder
    from vlm.data.store import Store

    pairs = []
    for source in recipe.data.sources.values():
        store = Store(load_manifest(list(source.shards)))
        chosen = min(count, len(store))
        for number in (len(store) * index // chosen for index in range(chosen)):
            sample = store.read(number)
            encode = PairEncoder(encoder) if sample.rejected else encoder
            pairs.append((sample, encode(sample, Draw(number, 0, recipe.seed))))
    return pairs
