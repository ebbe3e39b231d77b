"""A guide named in a recipe: loaded beside the model, refused where tokens or pixels differ, and asked first."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vlm.build import build_model, build_tokenizer
from vlm.commands import main
from vlm.data.index import load_manifest
from vlm.data.store import Store
from vlm.models.errors import ModelError
from vlm.models.pretrained import load_pretrained
from vlm.models.processing import load_processor, process
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.guide import Guide
from vlm.models.pruners.sgl import Sgl
from vlm.models.saved import save_composed
from vlm.plan import plan
from vlm.recipe import load_recipe

RECIPE = """
name: guided
model: {{from: {folder}/llava}}
evaluate:
  batch: 4
  pictures: 0
  benchmarks:
    pope:
      use: pope
      questions: [{folder}/scenes/benchmarks/pope_random.json]
      images: {folder}/scenes/test
      limit: 6
run: {{threads: 1, dir: {run}}}
"""
COMPOSED = """
name: composed
model:
  vision: {{use: conv_vit, image: 48, dim: 16, depth: 1, heads: 2}}
  connector: {{use: mlp, depth: 2{shuffle}}}
  language:
    config: {{model_type: llama, hidden_size: {width}, intermediate_size: 32, num_hidden_layers: 4,
              num_attention_heads: 2, num_key_value_heads: 2}}
    tokenizer: {folder}/scenes/tokenizer
data: {{sources: {{scenes: {{shards: {folder}/scenes/train}}}}}}
stages: [sft: {{mix: {{scenes: 1}}, train: {{language: {{lr: 1e-3}}}}, steps: 1}}]
"""


@pytest.fixture
def whole(stand_ins: Path, tmp_path: Path) -> Callable[..., Any]:
    """The recipe of a checkpoint, with overrides; ``whole.path`` is its file."""
    path = tmp_path / "whole.yaml"
    path.write_text(RECIPE.format(folder=stand_ins, run=tmp_path / "run"))
    return lambda *overrides: load_recipe(path, overrides)


@pytest.fixture
def small(stand_ins: Path, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint like the stand-in for LLaVA, of two layers; ``change(processor)`` makes another processor of its."""

    def make(change: Callable[[Any], None] = lambda processor: None, side: int = 48) -> Path:
        folder = tmp_path / f"small{len(list(tmp_path.iterdir()))}"
        config: Any = AutoConfig.from_pretrained(stand_ins / "llava")
        config.text_config.num_hidden_layers = 2
        config.vision_config.image_size = side
        torch.manual_seed(5)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
        processor: Any = AutoProcessor.from_pretrained(stand_ins / "llava")
        change(processor)
        processor.save_pretrained(folder)
        return folder

    return make


def test_a_recipe_s_guide_ranks_and_leaves_early(
    whole: Any, small: Any, stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = small()
    rows = [
        {},
        {"prune": {"use": "sgl", "keep": 9, "layer": 2, "guide": str(guide)}},
        {"prune": {"use": "sgl", "keep": 9, "layer": 2, "guide": str(guide), "exit": -1}},
        {"prune": {"use": "sgl", "keep": 9, "layer": 2, "guide": str(guide), "exit": 2}},
    ]
    assert "sgl" in plan(whole(f"evaluate.compare={json.dumps(rows)}"))
    path = str(tmp_path / "whole.yaml")
    assert main(["evaluate", path, f"evaluate.compare={json.dumps(rows)}"]) == 0
    results = json.loads((tmp_path / "run/evaluation.json").read_text())["results"]
    assert [result["cost"].get("early_exit_share") for result in results] == [None, None, 1.0, 0.0]
    assert [result["cost"]["visual_tokens"]["per_layer"] for result in results[1:]] == [[36, 36, 9, 9]] * 3
    (tmp_path / "a.png").write_bytes(Store(load_manifest([str(stand_ins / "scenes/test")])).read(0).media[0])
    asked = [path, str(tmp_path / "a.png"), "is there a cat ?", "--max-new-tokens", "4"]
    answers = []
    for words in ([f"prune={json.dumps(rows[2]['prune'])}"], [f"model.from={guide}"]):
        capsys.readouterr()
        assert main(["generate", *asked, *words]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_the_guide_s_choice_is_the_one_of_the_same_model_given_in_python(whole: Any, small: Any) -> None:
    folder, recipe = small(), whole()
    model = build_model(recipe, build_tokenizer(recipe)).eval()
    picture = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (48, 48, 3), generator=picture, dtype=torch.uint8).numpy()
    chat: Any = [("user", [Image.fromarray(pixels), "is there a cat ?"])]
    inputs = model.inputs(process(load_processor(folder), [chat]))
    kept = []
    for guide in (Guide.parse(str(folder)), Guide(load_pretrained(folder)), Guide()):
        with torch.no_grad(), attach(model, Sgl(Budget.parse(9), 2, guide).program(model.facts)):
            layout = model.prefill(inputs)[1].run.last
        kept.append(layout.source[layout.visual].tolist())
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("family", "expected a model of the same family as llava; found qwen2_5_vl"),
        ("words", r"expected the model's tokenizer, in which 'another' is None; found \d+"),
        ("pixels", "expected the model's image processor, image_mean"),
        ("tokens", "expected the model's 36 visual tokens of an image; found 49"),
        ("nothing", "no checkpoint at"),
    ],
)
def test_a_guide_to_whom_the_batch_means_something_else_is_refused(
    what: str, expected: str, whole: Any, small: Any, stand_ins: Path
) -> None:
    def other_mean(processor: Any) -> None:
        processor.image_processor.image_mean = [0.1, 0.2, 0.3]

    made: dict[str, Callable[[], Path]] = {
        "family": lambda: stand_ins / "qwen2_5_vl",
        "words": lambda: small(lambda processor: processor.tokenizer.add_tokens(["another"])),
        "pixels": lambda: small(other_mean),
        "tokens": lambda: small(side=56),
        "nothing": lambda: stand_ins / "nowhere",
    }
    with pytest.raises(ModelError, match=expected) as raised:
        plan(whole(f"prune={{use: sgl, keep: 9, guide: {made[what]()}}}"))
    assert "\n" not in str(raised.value)


def test_a_composed_model_is_guided_by_one_that_was_exported(stand_ins: Path, tmp_path: Path) -> None:
    path = tmp_path / "composed.yaml"

    def load(*overrides: str, width: int = 32, shuffle: str = "") -> Any:
        path.write_text(COMPOSED.format(folder=stand_ins, width=width, shuffle=shuffle))
        return load_recipe(path, [f"run.dir={tmp_path / 'run'}", *overrides])

    for name, shuffle in (("guide", ""), ("coarse", ", shuffle: 2")):
        recipe = load(width=16, shuffle=shuffle)
        tokenizer = build_tokenizer(recipe)
        save_composed(build_model(recipe, tokenizer), tmp_path / name, tokenizer=tokenizer)
    assert "sgl" in plan(load(f"prune={{use: sgl, keep: 9, guide: {tmp_path / 'guide'}, exit: 0.9}}"))
    with pytest.raises(ModelError, match=r"expected the model's grid of visual tokens, \(6, 6\); found \(3, 3\)"):
        plan(load(f"prune={{use: sgl, keep: 9, guide: {tmp_path / 'coarse'}}}"))
    with pytest.raises(ModelError, match="expected a saved composed model"):
        plan(load(f"prune={{use: sgl, keep: 9, guide: {stand_ins / 'llava'}}}"))
