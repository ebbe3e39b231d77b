"""The audit of a recipe before anything runs: no data is made, no weights are built, no GPU is needed."""

from collections.abc import Sequence
from pathlib import Path

from vlm.build import build_model, build_tokenizer, program_of
from vlm.create import check as check_methods
from vlm.data.index import load_manifest
from vlm.data.stream import legal_worlds
from vlm.evaluation.cost import layer_flops
from vlm.models.program.attach import check
from vlm.models.program.program import Program, Select
from vlm.models.program.signals import Facts
from vlm.models.vision_language import VisionLanguageModel
from vlm.recipe import Recipe, RecipeError
from vlm.training.module import PARTS

TEXT_TOKENS = 64  # a typical prompt, for the FLOPs of a row


def programs_of(recipe: Recipe, facts: Facts) -> dict[str, Program]:
    """Every program that the recipe will attach, by the title of its row."""
    rows = (recipe.own.model_copy(update={"label": "the recipe's own"}), *recipe.comparisons)
    return {row.title: program_of(row, facts) for row in rows}


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
    """Visual tokens per image before and after each program, and the FLOPs of its prefill against plain."""
    facts, config = model.facts, model.language.config
    full = model.visual_tokens
    mlp = config.intermediate_size  # type: ignore[union-attr]

    def flops(per_layer: Sequence[int]) -> float:
        return sum(layer_flops(n + TEXT_TOKENS, facts.width, mlp) for n in per_layer)

    rows = [("program", "visual tokens per image, by layer", "average", "prefill FLOPs vs plain")]
    for title, program in programs_of(recipe, facts).items():
        check(program, facts)
        per_layer = tokens_by_layer(program, full, facts.layers)
        ratio = flops(per_layer) / flops([full] * facts.layers)
        average = sum(per_layer) / facts.layers
        rows.append((title, " ".join(map(str, per_layer)), f"{average:.1f}", f"{ratio:.2f}"))
    return [*table(rows), f"Per image {full} visual tokens before any cut; FLOPs with {TEXT_TOKENS} text tokens."]


def tokens_by_layer(program: Program, full: int, layers: int) -> list[int]:
    """Visual tokens of one image in each decoder layer under ``program``."""
    cuts = {max(site.layer, 0): op.keep for site, op in program if isinstance(op, Select)}
    counts, now = [], full
    for layer in range(layers):
        if layer in cuts:
            now = cuts[layer].of(now)
        counts.append(now)
    return counts


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
