"""Memory, FLOPs and hours of a plan, against sums by hand for a model made here."""

from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from vlm.devices import by_driver, by_name
from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.connectors.mlp import Mlp
from vlm.models.vision_language import VisionLanguageModel
from vlm.plan_cluster import cluster, find_gpu, memory, stage_lengths, step_flops
from vlm.recipe import RecipeError
from vlm.recipe.schema import Recipe


@pytest.fixture
def model() -> VisionLanguageModel:
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    vision = ConvVit(image=48, dim=16, depth=2, heads=2)
    return VisionLanguageModel(vision, Mlp(vision_dim=16, language_dim=32), LlamaForCausalLM(config))


def recipe(train: dict[str, Any], **run: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {
                "vision": {"use": "conv_vit"},
                "connector": {"use": "mlp"},
                "language": {"use": "config", "config": {"model_type": "llama"}},
            },
            "data": {"sources": {"s": {"shards": "x"}}},
            "stages": [{"name": "one", "mix": {"s": 1}, "train": train, "steps": 1000, "global_batch": 16}],
            "run": {"dir": "x", **run},
        }
    )


LANGUAGE = {"language": {"lr": 1e-3}}


def test_what_each_strategy_shards(model: VisionLanguageModel) -> None:
    whole, trained = (sum(p.numel() for p in m.parameters()) * 4 / 2**30 for m in (model, model.language))
    of = recipe(LANGUAGE, devices=4, parallel="fsdp2")
    for parallel, expected in {
        "ddp": (whole, trained, 2 * trained),
        "zero1": (whole, trained, trained / 2),
        "zero2": (whole, trained / 4, trained / 2),
        "fsdp2": (whole / 4, trained / 4, trained / 2),
    }.items():
        found = memory(of, of.stages[0], model, parallel, 4)
        assert [found[kind] for kind in ("weights", "gradients", "optimizer")] == pytest.approx(expected)
    less = recipe(LANGUAGE, devices=4, parallel="fsdp2", checkpoint_activations=True)
    again = memory(less, less.stages[0], model, "fsdp2", 4)
    assert again["activations"] < memory(of, of.stages[0], model, "fsdp2", 4)["activations"]


def test_flops_of_a_step_by_hand(model: VisionLanguageModel) -> None:
    found = step_flops(recipe(LANGUAGE), recipe(LANGUAGE).stages[0], model)
    tokens, visual = 64 + 36, 36
    layer = 4 * 32 * 32 + 3 * 32 * 64
    sample = 3 * (6 * layer * tokens + 3 * 2 * 32 * tokens**2) + 6 * 32 * 100 * 64
    frozen = [*model.connector.parameters(), *(p for block in model.vision.blocks for p in block.parameters())]
    sample += 2 * sum(p.numel() for p in frozen if p.ndim > 1) * visual
    assert found == pytest.approx(16 * sample)


def test_hours_and_names(model: VisionLanguageModel) -> None:
    of = recipe(LANGUAGE, devices=2, parallel="ddp")
    _, lines = cluster(of, model, stage_lengths(of), find_gpu("h100"))
    hours = step_flops(of, of.stages[0], model) * 1000 / (989e12 * 0.35 * 2) / 3600
    assert f"1,000 steps: {hours:.3g} h on 2 x h100" in lines[1]
    with pytest.raises(RecipeError, match=r"--gpu: h10 is unknown; did you mean 'h100'"):
        find_gpu("h10")
    for driver, name in {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA L40S": "l40s", "NVIDIA L4": "l4", "NVIDIA A10G": "a10g",
    }.items():  # fmt: skip
        assert by_driver(driver) == by_name(name)
    assert by_driver("Some new one") is None
