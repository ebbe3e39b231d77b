"""lmms-eval's own runner, with its real package: a local task asks plain, pruned and mitigated models of a recipe."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow

from vlm.build import build_encoder, build_model, build_tokenizer, for_evaluation, program_of
from vlm.data.benchmarks._shared.images import ImageSource
from vlm.evaluation.answer import Asker, Prompt
from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.recipe import RecipeError, load_recipe
from vlm.recipe.schema import Comparison
from vlm.training.weights import trained_weights

pytest.importorskip("lmms_eval", reason="the extra lmms-eval is not installed")

SPLIT = "pope_random.json"
ROWS = """
evaluate:
  compare:
    - {label: plain}
    - {label: pruned, prune: {use: fastv, keep: 25%, layer: 1}}
    - {label: mitigated, mitigate: {use: pai_cfg, gamma: 30, cut: 0}}
"""
TASK = """
task: scenes_pope
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {parquet}}}, cache_dir: {folder}/cache}}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
generation_kwargs: {{max_new_tokens: 4, until: ["\\n\\n"], do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def task(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task over some questions of POPE, its pictures inside the parquet file."""
    import datasets

    folder = tmp_path_factory.mktemp("lmms")
    questions = [json.loads(line) for line in (scenes / "benchmarks" / SPLIT).read_text().splitlines()][:12]
    read = ImageSource(scenes / "test").read
    rows = {
        "image": [Pillow.open(io.BytesIO(read(q["image"]))) for q in questions],
        "key": [q["image"] for q in questions],
        "question": [("describe the image" if n % 2 else q["text"]) for n, q in enumerate(questions)],
        "label": [q["label"] for q in questions],
    }
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / "pope.parquet")
    (folder / "utils.py").write_text('def pictures(doc):\n    return [doc["image"].convert("RGB")]\n')
    (folder / "pope.yaml").write_text(
        TASK.format(parquet=folder / "pope.parquet", folder=folder, kind="generate_until")
    )
    return folder


@pytest.fixture
def judged(task: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``judged(recipe, row)`` is what lmms-eval reports of a row of the recipe."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")

    def call(recipe: Path, row: str) -> Any:
        manager = TaskManager("ERROR", include_path=str(task), include_defaults=False)
        told = f"recipe={recipe},row={row}"
        return simple_evaluate("vlm_recipe", told, tasks=["scenes_pope"], task_manager=manager, bootstrap_iters=0)

    return call


def answers(recipe: Path, row: Comparison, asked: list[dict[str, Any]], scenes: Path) -> list[str]:
    """What our own evaluation gets for the same questions."""
    loaded = load_recipe(recipe)
    tokenizer = build_tokenizer(loaded)
    model = build_model(loaded, tokenizer)
    trained_weights(loaded, model)
    model = for_evaluation(loaded, model)
    asker = Asker(model, tokenizer, build_encoder(loaded, model, tokenizer), ImageSource(scenes / "test").read, 64)
    prompts = [Prompt(doc["key"], doc["question"], 4) for doc in asked]
    with attach(model, program_of(row, model.facts)):
        found = asker(prompts, lambda count: None)
    return [found[prompt] for prompt in prompts]


def test_the_kit_gets_what_our_own_evaluation_gets(recipe, train, judged, scenes, task):
    import datasets

    recipe.write_text(recipe.read_text() + ROWS)
    train()
    asked = list(datasets.Dataset.from_parquet(str(task / "pope.parquet"), cache_dir=str(task / "cache")))
    seen = {}
    for row in load_recipe(recipe).comparisons:
        report = judged(recipe, row.title)
        samples = sorted(report["samples"]["scenes_pope"], key=lambda sample: sample["doc_id"])
        seen[row.title] = [sample["filtered_resps"][0] for sample in samples]
        assert seen[row.title] == answers(recipe, row, asked, scenes)
        right = sum(a == doc["label"] for a, doc in zip(seen[row.title], asked, strict=True)) / len(asked)
        assert report["results"]["scenes_pope"]["exact_match,none"] == pytest.approx(right)
    assert seen["mitigated"] != seen["plain"]


def test_a_row_that_the_recipe_has_not_and_a_task_that_samples_are_refused(recipe, train):
    from vlm.evaluation.lmms import RecipeModel

    train()
    with pytest.raises(RecipeError, match="row: plian is unknown; did you mean 'plain'"):
        RecipeModel(str(recipe), "plian")
    model = RecipeModel(str(recipe), **{"run.resume": "never", "batch_size": 1})
    with pytest.raises(ModelError, match="the task samples and the recipe answers greedily"):
        model._check_decoding({"do_sample": True, "temperature": 0.7})
    model.clean()


def test_the_likelihood_of_an_answer_is_that_of_its_tokens(recipe, train, scenes):
    """Against the model's own logits, row by row, without our loss."""
    from lmms_eval.api.instance import Instance

    from vlm.evaluation.lmms import RecipeModel

    recipe.write_text(recipe.read_text() + ROWS)
    train()
    model = RecipeModel(str(recipe))
    picture = Pillow.open(io.BytesIO(ImageSource(scenes / "test").read("test/000000")))
    model.task_dict = {"t": {"test": [{"image": picture}]}}
    instance = Instance(
        "loglikelihood",
        ("is there a cup ?", "no", lambda doc: [doc["image"]], 0, "t", "test"),
        0,
        {"task": "t", "doc_id": 0, "repeats": 1},
    )
    [(score, greedy)] = model.loglikelihood([instance])
    asked = Prompt(("t/test/0/0",), "is there a cup ?", 2)
    tokenizer = model.asker.tokenizer
    ids = [tokenizer.convert_tokens_to_ids("no"), tokenizer.eos_token_id]
    inputs = model.asker.inputs([asked])
    total = 0.0
    for token in ids:
        with torch.no_grad():
            logits = model.model.head(model.model(inputs).hidden[:, -1])
        total += float(logits.log_softmax(-1)[0, token])
        more = torch.cat([inputs.tokens, torch.tensor([[token]])], 1)
        inputs = inputs._replace(tokens=more, valid=torch.ones_like(more, dtype=torch.bool))
    assert score == pytest.approx(total, abs=1e-4)
    assert greedy == (model.asker([asked], lambda count: None)[asked] == "no")
    model.clean()
    pruned = RecipeModel(str(recipe), row="pruned")
    pruned.task_dict = model.task_dict
    assert abs(pruned.loglikelihood([instance])[0][0] - score) > 1e-4
    pruned.clean()
