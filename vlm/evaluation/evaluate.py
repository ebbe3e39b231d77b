"""Evaluation: every benchmark of the recipe for every row of its comparison, with the protocol of each number."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedTokenizerBase

from vlm.build import build_encoder, decoder_of, program_of
from vlm.create import create
from vlm.data.benchmarks._shared.images import ImageSource, check_images
from vlm.evaluation.answer import Asker, Prompt
from vlm.evaluation.classes import ClassAsker, asks_head, check_heads
from vlm.evaluation.cost import prefill_seconds, prompt_cost, token_seconds
from vlm.evaluation.pictures import draw_pictures
from vlm.models.base import BaseVlm
from vlm.models.program.attach import attach
from vlm.models.program.decode import Decoder
from vlm.models.program.program import Program
from vlm.progress import Progress
from vlm.recipe import Recipe, RecipeError
from vlm.recipe.schema import Comparison
from vlm.training.ranks import rank_and_world, total
from vlm.versions import versions

TIMED = 16  # prompts of a batch whose prefill and tokens are timed


class Bench:
    """A benchmark opened: its questions, and who answers them: the model in words, or the head that was trained.

    weights: the checkpoint with that head; None while it trains. limit: of questions, where the recipe has more.
    Raises DataError for a benchmark that cannot be asked, and lists the pictures that are missing.
    """

    def __init__(
        self,
        recipe: Recipe,
        label: str,
        model: BaseVlm,
        tokenizer: PreTrainedTokenizerBase,
        weights: Path | None,
        limit: int | None = None,
    ):
        self.label = label
        self.benchmark: Any = create("benchmark", recipe.evaluate.benchmarks[label])
        if limit is not None:
            self.benchmark = replace(self.benchmark, limit=min(limit, self.benchmark.limit or limit))
        self.questions = self.benchmark.ask()
        check_images(label, self.benchmark.images, self.questions)
        read = ImageSource(self.benchmark.images).read
        encoder, batch = build_encoder(recipe, model, tokenizer), recipe.evaluate.batch
        self.by_head = asks_head(self.benchmark)
        rest = model, tokenizer, encoder, read, batch, decoder_of(recipe)
        if self.by_head and weights is None:
            raise RecipeError(f"evaluate.during: {label} asks the head of a checkpoint; name the other benchmarks")
        self.ask = ClassAsker(recipe, weights, *rest) if self.by_head and weights else Asker(*rest)
        self.prompts = [Prompt(q.images, q.prompt, self.benchmark.max_new_tokens) for q in self.questions]

    @property
    def different(self) -> int:
        return len(set(self.prompts))

    def batch(self) -> Any:
        """The first questions as one batch."""
        return self.ask.inputs(self.prompts[: self.ask.batch])

    def answer(self, tick: Any, shared: bool = True) -> dict[str, str]:
        """The answers of the model as it is now, by question id; ``shared``: each rank finds some of them."""
        answers = self.ask(self.prompts, tick, shared)
        return {q.id: answers[prompt] for q, prompt in zip(self.questions, self.prompts, strict=True)}

    def named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{self.label}_{suffix}" if suffix else self.label: value for suffix, value in values.items()}


def evaluate(recipe: Recipe, model: BaseVlm, tokenizer: PreTrainedTokenizerBase, weights: Path) -> Path:
    """Run the recipe's evaluation; writes evaluation.json and pictures.json into the run's folder.

    Ranks that know each other share the questions; times, pictures and files are the first one's.
    weights: where the model's weights come from, for the protocol. Returns the path of evaluation.json.
    """
    model.eval()
    folder = Path(recipe.run.dir)
    rows = recipe.comparisons
    check_heads(recipe)
    benches = [Bench(recipe, label, model, tokenizer, weights) for label in recipe.evaluate.benchmarks]
    asked = [bench for bench in benches if not bench.by_head]  # of the language model
    total = len(rows) * sum(bench.different for bench in benches)
    rank, _ = rank_and_world()
    progress, done = Progress("evaluate", total, quiet=rank > 0), 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress.update(done)

    results = []
    plain: dict[str, dict[str, str]] = {}  # the answers without any method, which the others are paired with
    programs = [program_of(row, model.facts) for row in rows]
    decoders = [decoder_of(recipe, row) for row in rows]
    for row, program, decoder in zip(rows, programs, decoders, strict=True):
        for bench in asked:
            bench.ask.decoder = decoder
        with attach(model, program):
            result, answers = _evaluate_row(row, model, benches, plain, tick)
        results.append(result)
        if row.is_plain:
            plain = plain or answers
    path = folder / "evaluation.json"
    if rank > 0:
        return path
    if asked:
        _time(results, model, asked[0], programs, decoders)
    facts = {
        "name": recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe_hash": recipe.hash(),
        "weights": weights.name if folder in weights.parents else str(weights),
        "versions": versions(),
        "results": results,
    }
    path.write_text(json.dumps(facts, indent=1))
    pictures = draw_pictures(recipe, rows, asked, model)
    (folder / "pictures.json").write_text(json.dumps(pictures))
    return path


def _time(
    results: list[dict[str, Any]],
    model: BaseVlm,
    bench: Bench,
    programs: Sequence[Program],
    decoders: Sequence[Decoder | None],
) -> None:
    """Add the times of a prefill, and of a token after it, for the first prompts of a benchmark."""
    prompts = bench.ask.inputs(bench.prompts[: min(bench.ask.batch, TIMED)])
    prefills = prefill_seconds(model, prompts, programs)
    tokens = token_seconds(model, prompts, programs, decoders)
    for result, prefill, token in zip(results, prefills, tokens, strict=True):
        result["cost"] |= {"prefill_s": median(prefill), "token_s": median(token)}


def _decoding(decoder: Any) -> str:
    """How tokens were chosen, with every option: ``beam width=5 length_penalty=1.0 early_stopping=False``."""
    if decoder is None:
        return "greedy"
    options = [f"{name}={value}" for name, value in vars(decoder).items()]
    return " ".join([type(decoder).__name__.lower(), *options])


def _evaluate_row(
    row: Comparison, model: BaseVlm, benches: list[Bench], plain: dict[str, dict[str, str]], tick: Any
) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """The entry of one row in evaluation.json, and its answers by benchmark and question."""
    begun = time.perf_counter()
    answers = {bench.label: bench.answer(tick) for bench in benches}
    cost: dict[str, Any] = {"seconds": time.perf_counter() - begun}
    if model.engine is not None and model.engine.asked:  # a guide was asked first; the model ran for the others only
        answered, prompts = total([model.engine.answered, model.engine.asked])
        cost["early_exit_share"] = answered / prompts
    if asked := [bench for bench in benches if not bench.by_head]:
        cost |= prompt_cost(model, asked[0].batch())
    metrics: dict[str, Any] = {}
    protocol: dict[str, Any] = {}
    change: dict[str, Any] = {}
    for bench in benches:
        given = answers[bench.label]
        metrics |= bench.named(bench.benchmark.score(given))
        protocol |= bench.named(bench.benchmark.protocol())
        if plain:
            change |= bench.named(bench.benchmark.compare(plain[bench.label], given))
    mitigate = [method.record() for method in row.mitigate]
    decoding = _decoding(asked[0].ask.decoder) if asked else "best class" if benches else "greedy"
    result = {
        "label": row.title,
        "prune": row.prune.record() if row.prune else None,
        "kv": row.kv.record() if row.kv else None,
        "mitigate": (mitigate[0] if len(mitigate) == 1 else mitigate) or None,
        "decode": row.decode.record() if row.decode else None,
        "metrics": metrics,
        "cost": cost,
        "change": change,
        "protocol": {name: {**card, "decoding": decoding} for name, card in protocol.items()},
    }
    return result, answers
