"""The audit of a recipe before anything runs: no data is made, no weights are built, no GPU is needed."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from vlm.build import build_model, build_tokenizer, decoder_of, program_of
from vlm.create import check as check_methods
from vlm.create import create
from vlm.data.index import load_manifest
from vlm.data.store import Store
from vlm.data.stream import legal_worlds
from vlm.evaluation.classes import check_heads
from vlm.evaluation.forecast import forecast
from vlm.models.base import BaseVlm
from vlm.models.errors import ModelError
from vlm.models.lora import adapters, is_adapter
from vlm.models.program.artifact import AUTO, calibration_of
from vlm.models.program.attach import check
from vlm.models.program.budget import Budget
from vlm.models.program.decode import Decoder, check_decoder
from vlm.models.program.program import Edit, EditBlock, Gate, Prepare, Program, Rescore
from vlm.models.program.schedule import TEXT
from vlm.models.program.signals import Facts
from vlm.packing import plan_packs
from vlm.plan_cluster import cluster, find_gpu, stage_lengths
from vlm.recipe import Recipe, RecipeError
from vlm.recipe.schema import Comparison, Training
from vlm.training.memory import check_switches
from vlm.training.stages import check_stage

ANSWERS_ONLY = (Rescore, Gate, Edit, EditBlock, Prepare)  # ops that a training pass refuses
EXAMPLE = 1024  # visual tokens of the image that costs are told for where their number depends on the image


def programs_of(recipe: Recipe, facts: Facts) -> dict[str, Program]:
    """Every program that the recipe will attach, by the title of its row.

    Raises ModelError for a method that does not fit the model, or not the training that it shall act in, with its place
    in the recipe; RecipeError for one to be calibrated on data that there are none of.
    """
    own = recipe.own.model_copy(update={"label": "the recipe's own"})
    programs = {row.title: _program(row, facts, decoder_of(recipe, row)) for row in (own, *recipe.comparisons)}
    if recipe.stages and recipe.run.weights is None:
        _check_training(recipe, programs[own.title])
    if facts.shelf is not None and facts.shelf.awaited and not recipe.data.sources:
        who = next(iter(facts.shelf.awaited.values()))
        raise RecipeError(f"{who}: auto is found on samples of data.sources; expected a source, found none")
    return programs


def _check_training(recipe: Recipe, program: Program) -> None:
    """Refuse what is for answers only, before the first step does. Raises ModelError."""
    for method in recipe.mitigate:
        option = calibration_of(create("mitigate", method))
        if option is not None and option[1] == AUTO:
            raise ModelError(
                f"{method.where or method.use}: {method.use}.{option[0]}: auto is found after training, so the method "
                "cannot act in it; give it to the rows of evaluate.compare, not to the recipe itself"
            )
    acts = next((str(site) for site, op in program if isinstance(op, ANSWERS_ONLY)), None)
    if acts is not None:
        where = next((method.where for method in recipe.mitigate if method.where), "") or "mitigate"
        raise ModelError(
            f"{where}: this method acts at {acts} on a text that grows, which training does not have; give it to the "
            "rows of evaluate.compare, not to the recipe itself"
        )


def _program(row: Comparison, facts: Facts, decoder: Decoder | None) -> Program:
    try:
        program = program_of(row, facts)
        check(program, facts)
        _check_budget(row, facts)
        check_decoder(program, decoder)
    except ModelError as error:
        methods = [method for method in (row.prune, row.kv, *row.mitigate, row.decode) if method]
        where = next((method.where for method in methods if method.where), "")
        raise ModelError(f"{where or row.title}: {error}") from None
    return program


def _check_budget(row: Comparison, facts: Facts) -> None:
    """Refuse a number of tokens that no image has, where it is known. Raises ModelError."""
    if row.prune is None or facts.visual is None:
        return
    budget = getattr(create("prune", row.prune), "keep", None)
    if not isinstance(budget, Budget) or budget.tokens is None or budget.meaning in ("flops", "kv_bytes"):
        return
    if budget.tokens > facts.visual:
        expected = f"at most the {facts.visual} visual tokens of an image"
        raise ModelError(f"{row.prune.use}: keep: expected {expected}; found {budget.tokens}")


def plan(recipe: Recipe, gpu: str | None = None) -> str:
    """What the recipe would do, as text; contradictions raise RecipeError, DataError, ModelError or TrainingError.

    gpu: the name of the GPU (:mod:`vlm.devices`) that hours are told for.

    The tokenizer must be there for an exact count of the vocabulary; when the recipe still has to make its data
    the tokenizer comes with them, and the plan says what it leaves open.
    """
    named = find_gpu(gpu) if gpu else None
    check_methods(recipe)
    check_switches(recipe)
    check_heads(recipe)
    lines = [f"{recipe.name}  (recipe {recipe.hash()[:12]})", ""]
    made = recipe.data.make is not None and not _sources_exist(recipe)
    for number, stage in enumerate(recipe.stages):
        names = () if made or recipe.run.weights else stage.mix
        check_stage(
            recipe, number, {name: Store(load_manifest(list(recipe.data.sources[name].shards))) for name in names}
        )
    if made:
        lines += _data_to_make(recipe)
    else:
        lines += _data(recipe)
    model = None if made and not _tokenizer_exists(recipe) else _model(recipe)
    if model is None:
        lines += ["", "Model: its vocabulary comes with the data; run `vlm data make` and plan again for the audit."]
    else:
        lines += ["", *_parts(recipe, model), "", *_programs(recipe, model)]
    packs = [] if model is None else plan_packs(recipe, model, made)
    needs: list[str] = []
    if model is not None and recipe.stages and recipe.run.weights is None:
        rows, told = cluster(recipe, model, stage_lengths(recipe), named)
        needs = ["", *table(rows), *told]
    return "\n".join([*lines, "", *_batches(recipe), *packs, *needs])


def _model(recipe: Recipe) -> BaseVlm:
    # The vocabulary of a checkpoint is in its config; a new language model gets that of its tokenizer.
    tokenizer: Any = None if recipe.model.origin is not None else build_tokenizer(recipe)
    model = build_model(recipe, tokenizer, meta=True)
    for stage in recipe.stages:
        for role in stage.train:
            if role == "head":
                continue
            part = model.parts[role]
            if all(part.is_idle(name) for name, _ in part.named_parameters()):
                raise RecipeError(
                    f"stage {stage.name}: train.{role}: expected a part with parameters that train, found none"
                )
        if recipe.model.origin is not None and getattr(create("objective", stage.objective), "composed_only", False):
            objective = stage.objective
            raise RecipeError(
                f"{objective.where or stage.name}: objective {objective.use} trains a part of a composed model by "
                "itself; found model.from"
            )
    _check_lengths(recipe, model)
    return model


def _check_lengths(recipe: Recipe, model: BaseVlm) -> None:
    """Refuse what can fit no image, and a number of tokens where a share is needed."""
    most, full, prune = recipe.model.max_tokens, model.visual_tokens, recipe.prune
    if recipe.model.origin is not None and most is not None and full is not None and most <= full:
        raise RecipeError(
            f"model.max_tokens: expected more than the {full} visual tokens of an image, which are never cut; "
            f"found {most}"
        )
    if prune is None or prune.schedule is None:
        return
    keep = create("prune", prune).keep
    if keep is None:
        where = prune.where or "prune"
        raise RecipeError(f"{where}: keep: expected a budget for prune.schedule to come down to; found none")
    if keep.tokens and model.most_visual_tokens is None:
        raise RecipeError(
            f"{prune.where or 'prune'}: keep: expected a share such as 25%, because prune.schedule comes down from a "
            "share and the visual tokens of this model depend on the image; found a number"
        )


def _sources_exist(recipe: Recipe) -> bool:
    return all(Path(shard).exists() for source in recipe.data.sources.values() for shard in source.shards)


def _tokenizer_exists(recipe: Recipe) -> bool:
    language = recipe.model.language
    return language is None or language.tokenizer is None or Path(language.tokenizer).exists()


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


def _parts(recipe: Recipe, model: BaseVlm) -> list[str]:
    """The audit of parts: parameters without adapters, and per stage what of them trains and how fast."""
    rows = [("part", "parameters", *(stage.name for stage in recipe.stages))]
    total, trained, half = 0, [0] * len(recipe.stages), 0
    for role, part in model.parts.items():
        own = sum(p.numel() for name, p in part.named_parameters() if not is_adapter(name))
        added = sum(p.numel() for _, p in adapters(part))
        ever = False
        cells = []
        for number, stage in enumerate(recipe.stages):
            training = stage.train.get(role)  # type: ignore[call-overload]  # a role is one of the keys
            cells.append(_how(training, added))
            if training is not None:
                trained[number] += added if training.lora else own
                ever = ever or not training.lora
        total += own + added
        half += 0 if ever else own
        rows.append((role, f"{own:,}", *cells))
    if any("head" in stage.train for stage in recipe.stages):
        rows.append(("head", "by its classes", *(_how(stage.train.get("head"), 0) for stage in recipe.stages)))
    in_bf16 = recipe.model.origin is not None and recipe.run.precision == "bf16"
    # fp32 weights (frozen ones of a checkpoint in bf16); gradient and AdamW's two moments of trained ones
    memory = (4 * total - (2 * half if in_bf16 else 0) + 12 * max(trained, default=0)) / 2**20
    note = "frozen weights in bf16, the others in fp32," if in_bf16 else "in fp32"
    return [*table(rows), f"Weights, gradients and optimizer: {memory:,.1f} MiB {note} on each device (ddp)."]


def _how(training: Training | None, added: int) -> str:
    """How a part trains in a stage, as a cell of the audit."""
    if training is None:
        return "frozen"
    lora = f"lora {training.lora} ({added:,} parameters), " if training.lora else ""
    decay = f", decay {training.weight_decay:g}" if training.weight_decay else ""
    return f"{lora}lr {training.lr:g}{decay}"


def _programs(recipe: Recipe, model: BaseVlm) -> list[str]:
    """Visual tokens per image before and after each program, and what its prefill costs against plain."""
    facts, full = model.facts, model.most_visual_tokens or EXAMPLE
    assert facts.shape is not None  # every model of ours tells it
    plain = forecast((), full, facts.shape)
    rows: list[tuple[str, ...]] = [
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
    costs = f"prefill FLOPs and KV bytes against plain, {TEXT} text tokens"
    note = f"{_before(model, full)}; {costs}."
    awaited = sorted(set((facts.shelf.awaited or {}).values())) if facts.shelf is not None else []
    calibrated = f"Found on the data before the evaluation, or ahead by `vlm calibrate`: {', '.join(awaited)}."
    marks = ["<= where a pruner itself decides how many tokens stay."] if most else []
    return [*table(rows), note, *marks, *([calibrated] if awaited else [])]


def _before(model: BaseVlm, full: int) -> str:
    """How many visual tokens an image has before any cut."""
    if model.most_visual_tokens is None:
        return f"Visual tokens per image: depends on the image; the table is of one with {full}"
    if getattr(model, "max_patches", 0):
        return f"Per image 1 to {full} visual tokens before any cut, by its shape; the table is of one with {full}"
    if model.visual_tokens is None:
        most = (
            f"Per image {full} visual tokens before any cut at most: the whole image and as many tiles as it may have"
        )
        lines = (
            ", and a newline after each of their rows (beyond budgets of the encoder, of rows of which a token is left)"
        )
        return most + (lines if getattr(model, "newline", None) is not None else "")
    return f"Per image {full} visual tokens before any cut"


def runs(counts: Sequence[float]) -> str:
    """``576 x 2, 166 x 30``: equal neighbours together."""
    return ", ".join(f"{value:g} x {len(list(same))}" for value, same in groupby(counts))


def _batches(recipe: Recipe) -> list[str]:
    run = recipe.run
    if run.weights is not None:
        return [f"Weights: those of {run.weights}; nothing is trained here."]
    lines = []
    for stage in recipe.stages:
        batch = stage.global_batch or run.global_batch
        micro = run.micro_batch or batch // run.world
        worlds = ", ".join(map(str, legal_worlds(batch, micro)))
        lengths = [f"{getattr(stage, k):,} {k}" for k in ("steps", "samples", "tokens") if getattr(stage, k)]
        length, unit = (*lengths, "one round of its repeats")[0], "packs" if stage.pack else "samples"
        lines.append(
            f"Stage {stage.name}: {length}; {batch} {unit} per step = {run.world} device(s) x "
            f"{batch // run.world // micro} accumulated x {micro}; legal world sizes: {worlds}."
        )
    return lines


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
