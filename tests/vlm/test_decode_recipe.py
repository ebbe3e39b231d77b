"""``evaluate.decode``: how a recipe says which tokens are chosen, what is refused, and what the protocol then says."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlm.build import decoder_of
from vlm.commands import main
from vlm.create import check
from vlm.evaluation import answer
from vlm.evaluation.evaluate import _decoding
from vlm.evaluation.pictures import Gaze
from vlm.models.base import Overview
from vlm.models.decoders.beam import Beam
from vlm.models.errors import ModelError
from vlm.models.program.layout import IMAGE, TEXT, Layout
from vlm.models.program.signals import Facts
from vlm.plan import programs_of
from vlm.recipe import Recipe, RecipeError, load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "scenes.yaml"


def recipe(*overrides: str) -> Recipe:
    return load_recipe(RECIPE, [*overrides, "evaluate.compare=[]", "prune=null"])


@pytest.mark.parametrize(
    ("override", "expected", "said"),
    [
        ("evaluate.decode=null", None, "greedy"),
        ("evaluate.decode=greedy", "Greedy()", "greedy"),
        ("evaluate.decode=beam", "Beam(width=5, length_penalty=1.0, early_stopping=False)", None),
        (
            "evaluate.decode={use: beam, width: 3, early_stopping: never}",
            "Beam(width=3, length_penalty=1.0, early_stopping='never')",
            "beam width=3 length_penalty=1.0 early_stopping=never",
        ),
        (
            "evaluate.decode={use: sample, temperature: 0.7, top_k: 50, seed: 2}",
            "Sample(temperature=0.7, top_p=1.0, top_k=50, seed=2)",
            "sample temperature=0.7 top_p=1.0 top_k=50 seed=2",
        ),
    ],
)
def test_a_decoder_and_what_the_protocol_says_of_it(override, expected, said):
    found = recipe(override)
    check(found)
    decoder = decoder_of(found)
    assert decoder is None if expected is None else repr(decoder) == expected
    assert said is None or _decoding(decoder) == said


def test_without_the_key_decoding_is_greedy():
    assert recipe().evaluate.decode is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.decode=beem", r"evaluate.decode.*beem is unknown; did you mean 'beam'\?"),
        ("evaluate.decode={use: beam, widht: 3}", r"widht is unknown; did you mean 'width'\?"),
        ("evaluate.decode={use: beam, early_stopping: maybe}", r"early_stopping.*must be .*'never'.*maybe"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(override, message):
    with pytest.raises(RecipeError, match=message):
        check(recipe(override))


def test_a_method_that_needs_beams_is_refused_by_the_plan():
    facts = Facts(layers=4, width=32)
    with pytest.raises(ModelError, match=r"expected decode: beam, found sample$"):
        programs_of(recipe("mitigate=opera", "evaluate.decode=sample"), facts)
    programs_of(recipe("mitigate=opera", "evaluate.decode=beam"), facts)


def test_decoders_do_not_change_what_is_learned():
    assert recipe().identity_hash() == recipe("evaluate.decode=beam").identity_hash()
    assert recipe().hash() != recipe("evaluate.decode=beam").hash()


def test_the_beams_of_a_row_share_its_gaze():
    # two prompts of an image of 2 x 2 tokens and a word, each with two beams
    role = torch.tensor([[IMAGE] * 4 + [TEXT]] * 4)
    place = torch.tensor([[0, 1, 2, 3, -1]] * 4)
    sample = torch.tensor([0, 0, 1, 1])[:, None].expand(4, 5)
    layout = Layout(role, torch.where(role == IMAGE, sample, -1), place // 2, place % 2, place, sample, place)
    gaze = Gaze([Overview(0, 0, 2, 2), Overview(1, 0, 2, 2)])
    gaze(torch.tensor([[4.0, 0, 0, 0, 9], [0, 2.0, 0, 0, 9], [1.0, 1, 1, 1, 9], [3.0, 1, 1, 1, 9]]), layout)
    assert [heat.tolist() for heat in gaze.heat] == [[2.0, 1.0, 0.0, 0.0], [2.0, 1.0, 1.0, 1.0]]


def test_an_asker_uses_its_decoder(monkeypatch):
    seen: list[Any] = []

    def generated(model: Any, inputs: Any, **options: Any) -> list[list[int]]:
        seen.append((inputs, options))
        return [[1, 2]]

    monkeypatch.setattr(answer, "generate", generated)
    asker: Any = answer.Asker.__new__(answer.Asker)
    asker.decoder, asker.tokenizer, asker.model, asker.encoder = Beam(2), SimpleNamespace(eos_token_id=7), None, None
    asker.inputs = lambda prompts: "inputs"
    assert asker.generate([answer.Prompt("a", "b", 9)]) == [[1, 2]]
    [(inputs, told)] = seen
    assert inputs == "inputs" and {"max_new_tokens": 9, "stop": 7, "decoder": Beam(2)}.items() <= told.items()


@pytest.mark.slow
def test_a_row_may_decode_in_its_own_way(shrunk, tmp_path, monkeypatch):
    """From the answers to the pictures, whichever row stands last."""
    monkeypatch.chdir(tmp_path)
    recipe = Path(__file__).parents[2] / "recipes/scenes.yaml"
    beam = "decode: {use: beam, width: 2}"
    rows = f"[{{}}, {{{beam}, mitigate: {{use: opera}}}}, {{{beam}}}, {{prune: {{use: stride, keep: 50%}}}}]"
    words = [*shrunk(recipe), f"evaluate.compare={rows}", "run.dir=run"]
    assert main(["run", str(recipe), *words]) == 0
    results = json.loads(Path("run/evaluation.json").read_text())["results"]
    told = [next(iter(result["protocol"].values()))["decoding"].split()[0] for result in results]
    assert told == ["greedy", "beam", "beam", "greedy"]
    assert [result["decode"] is not None for result in results] == [False, True, True, False]
    assert len(json.loads(Path("run/pictures.json").read_text())["items"][0]["views"]) == 4
