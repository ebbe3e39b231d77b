"""Costs: what a pass measures against formulas and tensors, and what a plan says against what a pass measures."""

from pathlib import Path
from typing import Any

import pytest
import torch

import vlm
from vlm.create import create
from vlm.evaluation import cost
from vlm.evaluation.cost import prefill_seconds, prompt_cost, token_seconds
from vlm.evaluation.forecast import forecast, visual_per_layer
from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.connectors.mlp import Mlp
from vlm.models.language import build_language
from vlm.models.mitigators.m3id import M3id
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.program import LLM_IN, VIT_OUT, Select, llm_before, vit_after
from vlm.models.program.select import even_stride
from vlm.models.splice import IMAGE_TOKEN
from vlm.models.vision_language import Inputs, VisionLanguageModel
from vlm.recipe import Method

FOLDER = Path(vlm.__file__).parent / "models"
PRUNERS = sorted(path.stem for path in (FOLDER / "pruners").glob("*.py"))
POLICIES = sorted(path.stem for path in (FOLDER / "kv").glob("*.py"))
LAYERS, WIDTH, INNER, KV_HEADS, HEAD = 4, 32, 48, 2, 8
BYTES = 2 * KV_HEADS * HEAD * 8  # of a cache entry of all heads of a layer, in double precision


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    """36 visual tokens, 4 encoder blocks with a class token, 4 layers of 4 query and 2 key/value heads."""
    torch.manual_seed(0)
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "initializer_range": 0.25,
    }
    vision = ConvVit(48, dim=16, depth=4, heads=2, class_token=True)
    return VisionLanguageModel(vision, Mlp(vision.dim, WIDTH), build_language(config, 40)).double().eval()


def prompts(*words: int) -> Inputs:
    """A row for each number of text tokens: one of them, an image, the others."""
    longest = max(words) + 1
    tokens = torch.randint(0, 40, (len(words), longest))
    tokens[:, 1] = IMAGE_TOKEN
    valid = torch.arange(longest) <= torch.tensor(words)[:, None]
    return Inputs(tokens, valid, torch.randn(len(words), 3, 48, 48).double(), torch.arange(len(words)))


def measured(model: Any, program: Any, inputs: Inputs) -> dict[str, Any]:
    with attach(model, program):
        return prompt_cost(model, inputs)


def layer_flops(n: int) -> int:
    return 4 * n * WIDTH**2 + 2 * n**2 * WIDTH + 3 * n * WIDTH * INNER


def method(kind: str, name: str, **options: Any) -> Any:
    return create(kind, Method.model_validate({"use": name, **options}))


def test_flops_are_those_of_each_sample_and_padding_costs_nothing(model):
    found = measured(model, ((llm_before(2), Select(Budget(tokens=9), even_stride())),), prompts(5, 60))
    each = [2 * layer_flops(36 + words) + 2 * layer_flops(9 + words) for words in (5, 60)]
    assert found["llm_flops_per_prompt"] == sum(each) / 2
    assert found["text_tokens"] == 32.5
    tokens = found["visual_tokens"]
    assert tokens == {"before": 36, "after": 9, "after_layer": 9, "average": 22.5, "per_layer": [36, 36, 9, 9]}


@pytest.mark.parametrize("policy", [None, *POLICIES])
def test_kv_bytes_are_those_of_the_cache(model, policy):
    program = ((llm_before(2), Select(Budget(tokens=9), even_stride())),)
    if policy is not None:
        program += method("kv", policy, keep="40%").program(model.facts)
    found = measured(model, program, prompts(20))
    assert found["kv_bytes_per_prompt"] == sum(found["kv_entries_per_layer"]) * BYTES
    assert found["kv_bytes_per_prompt"] <= found["kv_bytes_allocated"]
    if policy is None:
        assert found["kv_entries_per_layer"] == [56, 56, 29, 29]
        assert found["kv_bytes_per_prompt"] == found["kv_bytes_allocated"]


def test_streams_are_added(model):
    found = measured(model, M3id().program(model.facts), prompts(20))
    assert found["streams"] == 2
    assert found["llm_flops_per_prompt"] == 4 * layer_flops(56) + 4 * layer_flops(20)
    assert found["kv_bytes_per_prompt"] == 4 * (56 + 20) * BYTES


def test_programs_take_turns_and_the_first_round_warms_up(model, monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(cost, "open_streams", lambda m, inputs: seen.append(m.engine and m.engine.program))
    cut = ((LLM_IN, Select(Budget(tokens=9), even_stride())),)
    assert [len(times) for times in prefill_seconds(model, prompts(3), [(), cut], repeats=3)] == [3, 3]
    assert seen == [None, cut] * 4


def test_a_further_token_is_what_more_tokens_take_longer(model, monkeypatch):
    clock, asked = [0.0], []

    def answer(m: Any, inputs: Any, max_new_tokens: int, stop: int, decoder: Any) -> None:
        asked.append(max_new_tokens)
        clock[0] += 5 + 2 * max_new_tokens

    monkeypatch.setattr(cost, "generate", answer)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    assert token_seconds(model, prompts(3), [(), ()], [None, None], repeats=2) == [[2, 2], [2, 2]]
    assert asked == [1 + cost.STEPS, 1] * 6


def compare(model: Any, program: Any) -> None:
    """What is forecast of a prompt of 64 text tokens is what a pass of it measures."""
    told = forecast(program, 36, model.facts.shape)
    found = measured(model, program, prompts(64))
    if told.most:
        assert all(a >= b for a, b in zip(told.main.visual, found["visual_tokens"]["per_layer"], strict=True))
        assert told.flops >= found["llm_flops_per_prompt"]
        return
    assert list(told.main.visual) == found["visual_tokens"]["per_layer"]
    assert told.flops == found["llm_flops_per_prompt"]
    rounding = (
        found["streams"] * LAYERS * BYTES
    )  # an entry per layer, where layers divide a budget by what they attend to
    assert told.kv_bytes == pytest.approx(found["kv_bytes_per_prompt"], rel=1e-9, abs=rounding)


@pytest.mark.parametrize("name", PRUNERS)
def test_a_plan_of_a_pruner_is_what_happens(model, name):
    keep: Any = {"average": 22} if name == "vtw" else "25%"  # which leaves nothing at the end
    compare(model, method("prune", name, keep=keep).program(model.facts))


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "divprune"])
@pytest.mark.parametrize("keep", [{"average": 22}, {"flops": "85%"}, {"kv_bytes": "85%"}, {"after_layer": 20}], ids=str)
def test_a_plan_in_every_meaning_of_a_budget_is_what_happens(model, name, keep):
    compare(model, method("prune", name, keep=keep).program(model.facts))


@pytest.mark.parametrize("name", POLICIES)
def test_a_plan_of_a_policy_is_what_happens(model, name):
    cut = ((llm_before(2), Select(Budget(tokens=9), even_stride())),)
    compare(model, cut + method("kv", name, keep=12).program(model.facts) + M3id().program(model.facts))


def test_cuts_in_encoder_and_decoder_are_counted_where_they_act(model):
    half, quarter = Budget(ratio=0.5), Budget(ratio=0.25)
    program = (
        (vit_after(1), Select(Budget(tokens=30), even_stride())),
        (VIT_OUT, Select(half, even_stride())),
        (llm_before(1), Select(half, even_stride())),  # of the 36, so nothing goes
        (llm_before(3), Select(quarter, even_stride())),
    )
    assert visual_per_layer(program, 36, LAYERS) == ([18, 18, 18, 9], False)
    compare(model, program)


def test_selectors_that_decide_themselves_are_bound_by_the_last_cut_only(model):
    free = Select(Budget(tokens=4), even_stride(), exact=False)
    last = Select(Budget(tokens=6), even_stride())
    assert visual_per_layer(((vit_after(0), free), (vit_after(2), last)), 36, 2) == ([6, 6], False)
    assert visual_per_layer(((llm_before(1), free), (llm_before(3), last)), 36, 4) == ([36, 36, 36, 6], True)
    assert visual_per_layer(((VIT_OUT, free),), 36, 2) == ([4, 4], True)
