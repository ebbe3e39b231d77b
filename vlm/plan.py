"""The audit of a recipe before anything runs: no data is made, no weights are built, no GPU is needed."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from vlm.build import build_model, build_tokenizer, decoder_of, program_of
from vlm.create import check as check_methods
from vlm.data.index import load_manifest
from vlm.data.stream import legal_worlds
from vlm.evaluation.forecast import forecast
from vlm.models.errors import ModelError
from vlm.models.program.attach import check
from vlm.models.program.decode import Decoder, check_decoder
from vlm.models.program.program import Program
from vlm.models.program.schedule import TEXT
from vlm.models.program.signals import Facts
from vlm.models.vision_language import VisionLanguageModel
from vlm.recipe import Recipe, RecipeError
from vlm.recipe.schema import Comparison
from vlm.training.module import PARTS


def programs_of(recipe: Recipe, facts: Facts) -> dict[str, Program]:
    """Every program that the recipe will attach, by the title of its row.

    Raises ModelError for a method that does not fit the model, with its place in the recipe.
    """
    rows = (recipe.own.model_copy(update={"label": "the recipe's own"}), *recipe.comparisons)
    decoder = decoder_of(recipe)
    return {row.title: _program(row, facts, decoder) for row in rows}


def _program(row: Comparison, facts: Facts, decoder: Decoder | None) -> Program:
    try:
        program = program_of(row, facts)
        check(program, facts)
        check_decoder(program, decoder)
    except ModelError as error:
        methods = [method for method in (row.prune, row.kv, *row.mitigate) if method]
        where = next((method.where for method in methods if method.where), "")
        raise ModelError(f"{where or row.title}: {error}") from None
    return program


def plan(recipe: Recipe) -> str:
    """What the recipe would do, as text; contradictions raise RecipeError, DataError or ModelError.

    The tokenizer must be there for an exact count of the vocabulary; when the recipe still has to make its data
    the tokenizer comes with them, and the plan says what it leaves open.
    """
    check_methods(recipe)
    lines = [f"{recipe.name}  (recipe {recipe.hash()[:12]})", ""]
    made = recipe.data.make is not None and not _sources_exist(recipe)
    if made:
        lines += _data_to_make(recipe)
    else:
        lines += _data(recipe)
    model = None if made and not _tokenizer_exists(recipe) else _model(recipe)
    if model is None:
        lines += ["", "Model: its vocabulary comes with the data; run `vlm data make` and plan again for the audit."]
    else:
        lines += ["", *_parts(recipe, model), "", *_programs(recipe, model)]
    return "\n".join([*lines, "", *_batches(recipe)])


def _model(recipe: Recipe) -> VisionLanguageModel:
    model = build_model(recipe, build_tokenizer(recipe), meta=True)
    for stage in recipe.stages:
        for part in stage.train:
            if not any(True for _ in getattr(model, part).parameters()):
                raise RecipeError(f"stage {stage.name}: train.{part}: expected a part with parameters, found none")
    return model


def _sources_exist(recipe: Recipe) -> bool:
    return all(Path(shard).exists() for source in recipe.data.sources.values() for shard in source.shards)


def _tokenizer_exists(recipe: Recipe) -> bool:
    language = recipe.model.language
    return language.tokenizer is None or Path(language.tokenizer).exists()


def _data_to_make(recipe: Recipe) -> list[str]:
    assert recipe.data.make is not None
    return [f"Data: made here first by {recipe.data.make.use}: {dict(recipe.data.make.options)}"]


def _data(recipe: Recipe) -> list[str]:
    rows = [("source", "samples", "shards", "bytes", "hash")]
    for name, source in recipe.data.sources.items():
        manifest = load_manifest(list(source.shards))
        size = sum(shard.bytes for shard in manifest.shards)
        rows.append((name, f"{len(manifest):,}", str(len(manifest.shards)), f"{size:,}", manifest.hash[:12]))
    return table(rows)


def _parts(recipe: Recipe, model: VisionLanguageModel) -> list[str]:
    """The audit of parts: parameters, and per stage the learning rate or that the part is frozen."""
    rows = [("part", "parameters", *(stage.name for stage in recipe.stages))]
    for part in PARTS:
        count = sum(p.numel() for p in getattr(model, part).parameters())
        cells = []
        for stage in recipe.stages:
            training = stage.train.get(part)  # type: ignore[call-overload]
            decay = f", decay {training.weight_decay:g}" if training and training.weight_decay else ""
            cells.append(f"lr {training.lr:g}{decay}" if training else "frozen")
        rows.append((part, f"{count:,}", *cells))
    total = sum(p.numel() for p in model.parameters())
    trained = max(
        sum(p.numel() for part in stage.train for p in getattr(model, part).parameters()) for stage in recipe.stages
    )
    memory = (4 * total + 12 * trained) / 2**20  # fp32 weights; gradient and AdamW's two moments of trained ones
    return [*table(rows), f"Weights, gradients and optimizer: {memory:,.1f} MiB in fp32 on each device (ddp)."]


def _programs(recipe: Recipe, model: VisionLanguageModel) -> list[str]:
    """Visual tokens per image before and after each program, and what its prefill costs against plain."""
    facts, full = model.facts, model.most_visual_tokens
    assert facts.shape is not None  # every model of ours tells it
    plain = forecast((), full, facts.shape)
    rows = [
        ("program", "visual tokens per image x layers", "average", "final", "LLM FLOPs vs plain", "KV bytes vs plain")
    ]
    most = False
    for title, program in programs_of(recipe, facts).items():
        found = forecast(program, full, facts.shape)
        most = most or found.most
        mark = "<= " if found.most else ""
        counts = [f"{mark}{runs(found.main.visual)}", f"{mark}{found.main.average:.1f}", f"{found.main.final:g}"]
        shares = [f"{found.flops / plain.flops:.2f}", f"{found.kv_bytes / plain.kv_bytes:.2f}"]
        rows.append((title, *counts, *shares))
    tiles = f"; at most: the whole image and {model.max_tiles} tiles" if model.max_tiles else ""
    costs = f"prefill FLOPs and KV bytes against plain, {TEXT} text tokens"
    note = f"Per image {full} visual tokens before any cut{tiles}; {costs}."
    return [*table(rows), note, *(["<= where a pruner itself decides how many tokens stay."] if most else [])]


def runs(counts: Sequence[float]) -> str:
    """``576 x 2, 166 x 30``: equal neighbours together."""
    return ", ".join(f"{value:g} x {len(list(same))}" for value, same in groupby(counts))


def _batches(recipe: Recipe) -> list[str]:
    run = recipe.run
    lines = []
    for stage in recipe.stages:
        batch = stage.global_batch or run.global_batch
        micro = run.micro_batch or batch // run.devices
        worlds = ", ".join(map(str, legal_worlds(batch, micro)))
        length = next(f"{getattr(stage, k):,} {k}" for k in ("steps", "samples", "tokens") if getattr(stage, k))
        lines.append(
            f"Stage {stage.name}: {length}; {batch} samples per step = {run.devices} device(s) x "
            f"{batch // run.devices // micro} accumulated x {micro}; legal world sizes: {worlds}."
        )
    return lines


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
