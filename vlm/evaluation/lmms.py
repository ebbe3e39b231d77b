"""Recipes as models of lmms-eval, so that its tasks judge what a recipe trains, prunes and mitigates.

    lmms-eval --model vlm_recipe --model_args recipe=recipes/scenes.yaml,row=var --tasks pope

The package is an optional extra (``pip install 'vlm-recipes[lmms-eval]'``) and finds this module by an entry point
(``lmms_plugin``). ``row`` names a row of ``evaluate.compare``, whose pruner, cache policy and mitigators act; without
one it is the recipe's own that do. Every other argument is an override of the recipe.
"""

import io
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image

from vlm.build import build_collate, build_encoder, build_model, build_tokenizer, decoder_of, for_evaluation, program_of
from vlm.create import check
from vlm.data.batch import Batch
from vlm.data.draw import Draw
from vlm.data.schema import Message, Part, Sample
from vlm.evaluation.answer import Asker, Prompt
from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.progress import Progress
from vlm.recipe import RecipeError, load_recipe
from vlm.recipe.errors import unknown
from vlm.recipe.schema import Comparison
from vlm.training.loss import inputs_of
from vlm.training.weights import trained_weights

# lmms-eval hands these to every model; a recipe says them itself.
GIVEN_BY_THE_KIT = ("batch_size", "max_batch_size", "device")
MOST_TOKENS = 128  # of an answer, where a task says nothing


class RecipeModel(lmms):
    """The trained model of a recipe, under the recipe's own program.

    Args:
        recipe: a YAML file, or the name of a packaged recipe.
        row: title of a row of ``evaluate.compare``; the recipe's own methods when None.
        overrides: ``{"prune.use": "fastv"}``; values as lmms-eval read them from its command line.

    Raises:
        RecipeError, ModelError, TrainingError: as ``vlm evaluate`` does, before any question is asked.
    """

    is_simple = True

    def __init__(self, recipe: str, row: str | None = None, **overrides: Any) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ModelError("vlm_recipe: it answers in one process; expected WORLD_SIZE=1")
        changes = [f"{key}={_spelt(value)}" for key, value in overrides.items() if key not in GIVEN_BY_THE_KIT]
        self.recipe = load_recipe(recipe, changes)
        check(self.recipe)
        chosen = self._row(row)
        tokenizer = build_tokenizer(self.recipe)
        model = build_model(self.recipe, tokenizer)
        trained_weights(self.recipe, model)
        self.model = for_evaluation(self.recipe, model)
        self.encoder = build_encoder(self.recipe, self.model, tokenizer)
        self.collate = build_collate(self.encoder, tokenizer)
        self.pictures: dict[str, Callable[[], Image.Image]] = {}  # by key; a whole benchmark may not fit in memory
        read, batch = self._read, self.recipe.evaluate.batch
        self.asker = Asker(self.model, tokenizer, self.encoder, read, batch, decoder_of(self.recipe, chosen))
        self.attached = ExitStack()
        self.attached.enter_context(attach(self.model, program_of(chosen, self.model.facts)))

    def _row(self, title: str | None) -> Comparison:
        rows = {row.title: row for row in self.recipe.comparisons}
        if title is not None and title not in rows:
            raise RecipeError(f"row: {title} {unknown(title, rows)}")
        return self.recipe.own if title is None else rows[title]

    def clean(self) -> None:
        """Take the program off the model."""
        self.attached.close()
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests, cut before the first of a task's stop texts."""
        prompts, stops = [], []
        for request in requests:
            context, options, visuals, number, task, split = _asked(request)
            self._check_decoding(options)
            keys = self._show(task, split, number, visuals)
            limit = options.get("max_new_tokens")
            prompts.append(Prompt(keys, context, MOST_TOKENS if limit is None else int(limit)))
            stops.append(_texts(options.get("until")))
        progress, done = Progress("lmms-eval", len(set(prompts))), 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            progress.update(done)

        answers = self.asker(prompts, tick)
        return [_until(answers[prompt], ends) for prompt, ends in zip(prompts, stops, strict=True)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation with the end of the turn behind it, and whether it is the greedy one."""
        found = []
        for request in requests:
            context, target, visuals, number, task, split = _asked(request)
            wanted = target if isinstance(target, str) else target(self.task_dict[task][split][number])
            keys = self._show(task, split, number, visuals)
            parts = Prompt(keys, context, 1).parts()
            shown = [Part("text", part) if isinstance(part, str) else Part("image", ref=part) for part in parts]
            said = Message("assistant", (Part("text", wanted.strip()),))
            media = tuple(self._read(key) for key in keys)
            batch = self._batch(Sample(f"{task}/{number}", (Message("user", tuple(shown)), said), media))
            with torch.no_grad():
                loss = self.model(inputs_of(batch), batch.weights).loss
            prompt = Prompt(keys, context, int((batch.weights > 0).sum()))
            found.append((-float(loss), self.asker([prompt], lambda count: None)[prompt] == wanted.strip()))
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise ModelError("vlm_recipe: tasks of several rounds are not supported; expected output_type generate_until")

    def _batch(self, sample: Sample) -> Batch:
        device = next(self.model.parameters()).device
        return self.collate([self.encoder(sample, Draw(0, 0, 0))]).to(device)

    def _show(self, task: str, split: str, number: Any, visuals: Any) -> tuple[str, ...]:
        """Keys of the pictures of a question, which are read when they are needed."""

        def pictures() -> list[Any]:
            return list(visuals(self.task_dict[task][split][number])) if visuals is not None else []

        keys = []
        for place, picture in enumerate(pictures()):
            keys.append(f"{task}/{split}/{number}/{place}")
            if not isinstance(picture, Image.Image):
                raise ModelError(f"vlm_recipe: {keys[-1]}: expected a picture, found {type(picture).__name__}")
            self.pictures[keys[-1]] = lambda place=place: pictures()[place]
        return tuple(keys)

    def _read(self, key: str) -> bytes:
        return _encoded(self.pictures[key]())

    def _check_decoding(self, options: Mapping[str, Any]) -> None:
        """Refuse a task that samples or searches when the recipe does not say how: its numbers would be others."""
        samples = bool(options.get("do_sample")) and options.get("temperature", 1.0) not in (None, 0)
        searches = (options.get("num_beams") or 1) > 1
        if (samples or searches) and self.asker.decoder is None:
            what = "samples" if samples else f"searches with {options['num_beams']} beams"
            raise ModelError(f"vlm_recipe: the task {what} and the recipe answers greedily; set evaluate.decode")


def _asked(request: Instance) -> tuple[str, Any, Any, Any, str, str]:
    """Context, options or target, what gives the pictures of a document, its number, task, split."""
    return request.args  # type: ignore[return-value]  # the kit leaves its arguments untyped


def _spelt(value: Any) -> str:
    """A value as a recipe's override spells it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _texts(until: Any) -> tuple[str, ...]:
    return () if until is None else (until,) if isinstance(until, str) else tuple(until)


def _until(answer: str, ends: Iterable[str]) -> str:
    places = [answer.find(end) for end in ends if end and end in answer]
    return answer[: min(places)] if places else answer


def _encoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.convert("RGB").save(file, format="PNG", compress_level=1)
    return file.getvalue()
