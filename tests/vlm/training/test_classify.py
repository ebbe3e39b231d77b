"""An encoder trained and judged alone: what the loss is, what trains, and who answers in an evaluation."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from vlm.commands import main
from vlm.create import create
from vlm.data.batch import Example, collate
from vlm.data.errors import DataError
from vlm.evaluation.classes import check_heads
from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.connectors.linear import Linear
from vlm.models.errors import ModelError
from vlm.models.language import build_language
from vlm.models.vision_language import VisionLanguageModel
from vlm.recipe import Method, RecipeError, load_recipe
from vlm.training.module import TrainingModule

PROBE = Path(__file__).parents[3] / "recipes/scenes_probe.yaml"


def method(**options):
    return create("objective", Method.model_validate({"use": "classify", **options}))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    language = build_language(config | {"num_attention_heads": 1}, 20)
    return VisionLanguageModel(ConvVit(48, dim=16, depth=1, heads=2), Linear(16, 8), language)


def batch(*tags):
    examples = [
        Example(f"s{n}", [-1, 3], [0.0, 1.0], torch.randn(1, 3, 48, 48), tags=one) for n, one in enumerate(tags)
    ]
    return collate(examples, pad_id=0)


def test_one_class_is_a_softmax_and_several_are_each_a_yes_or_no(model):
    given = batch(("cup",), ("fork",), ("plate",))
    truth = torch.tensor([0, 1, 2])
    for labels in ("one", "many"):
        objective = method(head={"use": "linear"}, labels=labels).build(model, ("cup", "fork", "plate")).eval()
        logits = objective.logits(model, given.images)
        loss = objective(model, given)
        expected = (
            F.cross_entropy(logits, truth, reduction="sum")
            if labels == "one"
            else F.binary_cross_entropy_with_logits(logits, F.one_hot(truth, 3).float(), reduction="sum") / 3
        )
        torch.testing.assert_close(loss.value, expected)
        assert loss.weight == 3 and loss.logs["top1"] == (logits.argmax(1) == truth).float().mean()


def test_a_batch_without_images_reaches_every_weight(model):
    objective = method(head={"use": "ep", "queries": 4}).build(model, ("cup", "fork"))
    blank = collate([Example("s", [3], [1.0], torch.zeros(0, 3, 0, 0))], pad_id=0)
    loss = objective(model, blank)
    loss.value.backward()
    assert loss.value == 0 and loss.weight == 0
    assert all(p.grad is not None for p in objective.parameters())
    model.zero_grad()


def test_what_cannot_be_classified_is_refused(model):
    tags = ("cup", "fork")
    objective = method(head={"use": "linear"}).build(model, tags)
    with pytest.raises(DataError, match=r"sample s0: .* expected one tag, its class; found cup, fork"):
        objective(model, batch(tags))
    with pytest.raises(DataError, match="two classes or more; found 1"):
        method(head={"use": "linear"}).build(model, ("cup",))
    with pytest.raises(ModelError, match="vwformer classifies pixels"):
        method(head={"use": "vwformer"}).build(model, tags)
    with pytest.raises(RecipeError, match="needs the option 'head'"):
        method()
    with pytest.raises(RecipeError, match="lin is unknown; did you mean 'linear'"):
        method(head={"use": "lin"})


def test_a_head_trains_alone_or_with_the_encoder(model):
    for train, frozen in (({"head": {"lr": 0.1}}, True), ({"vision": {"lr": 0.2}, "head": {"lr": 0.1}}, False)):
        recipe = load_recipe(PROBE, [f"stages.1.train={train}"])
        objective = method(head={"use": "ep", "queries": 4}).build(model, ("cup", "fork"))
        module = TrainingModule(model, objective, "sample", recipe.stages[1], 10, 4)
        assert all(p.requires_grad != frozen for p in model.vision.parameters() if p is not model.vision.model.norm)
        groups = module.configure_optimizers()["optimizer"].param_groups
        by = {name: [p for g in groups if g["name"] == name for p in g["params"]] for name in ("vision", "head")}
        assert {id(p) for p in by["head"]} == {id(p) for p in objective.parameters()}
        assert bool(by["vision"]) != frozen


def test_recipes_that_ask_no_head_are_refused():
    with pytest.raises(RecipeError, match=r"classification asks the head .* objective to be classify; found tags"):
        check_heads(load_recipe(PROBE, ["stages.1.objective=tags"]))
    with pytest.raises(RecipeError, match=r"judges the encoder alone.*found stride"):
        check_heads(load_recipe(PROBE, ["evaluate.compare=[{}, {prune: {use: stride, keep: 50%}}]"]))
    with pytest.raises(RecipeError, match=r"stages.1.train.head.lora is for parts of the model"):
        load_recipe(PROBE, ["stages.1.train.head.lora=4"])
    assert load_recipe(PROBE, ["stages.1.objective.head=linear"]).stages[1].objective.options["head"] == {
        "use": "linear"
    }


def test_an_objective_without_a_head_has_none_to_train(model):
    stage = load_recipe(PROBE, ["stages.1.objective=chat"]).stages[1]
    with pytest.raises(ValueError, match=r"train\.head: expected an objective with a head; objective chat has none"):
        TrainingModule(model, method_chat(model), "token", stage, 10, 4)


def method_chat(model):
    return create("objective", Method(use="chat")).build(model, ())


@pytest.mark.slow
def test_a_probe_learns_and_is_asked(shrunk, tmp_path, monkeypatch):
    """A head of a frozen encoder beats the share of pictures with the commonest class; the encoder stays as it was."""
    import json

    monkeypatch.chdir(tmp_path)
    words = [word for word in shrunk(PROBE) if "limit" not in word and "stages.1.steps" not in word]
    words += ["stages.1.steps=60", "stages.1.global_batch=32", "data.make.test=40", "data.make.train=600"]
    assert main(["run", str(PROBE), *words]) == 0
    run = Path("runs/scenes-probe")
    files = sorted((run / "checkpoints").glob("*.ckpt"))
    content = torch.load(files[-1], weights_only=True)
    truth = json.loads(Path("runs/data/scenes/benchmarks/chair.json").read_text())
    assert set(content["classes"]) >= {name for names in truth.values() for name in names}
    result = json.loads((run / "evaluation.json").read_text())["results"][0]
    counts = [sum(name in names for names in truth.values()) / len(truth) for name in content["classes"]]
    assert result["metrics"]["classification"]["top1"] >= max(counts) - 0.1
    assert result["metrics"]["classification"]["n"] == len(truth)
    assert result["protocol"]["classification"]["decoding"] == "best class"
    assert "llm_flops_per_prompt" not in result["cost"]
