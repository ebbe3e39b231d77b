"""The gradient of a step is that of the whole global batch, however it is split, and as computed sample by sample.

And what surrounds it: frozen parts, pruners and their schedule, the course of the learning rate, losses that are not
finite.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from vlm.build import build_encoder, build_model, build_tokenizer
from vlm.data.batch import Example
from vlm.data.draw import Draw
from vlm.data.index import load_manifest
from vlm.data.order import Order
from vlm.data.store import Store
from vlm.models.splice import IMAGE_TOKEN
from vlm.models.vision_language import VisionLanguageModel
from vlm.objectives.chat import ChatLoss
from vlm.objectives.tags import TagsLoss
from vlm.plan import plan
from vlm.recipe import load_recipe
from vlm.recipe.schema import Recipe, Schedule
from vlm.training import train as training
from vlm.training.callbacks import Watch
from vlm.training.errors import TrainingError
from vlm.training.loss import Loss
from vlm.training.module import TrainingModule, rate

# One step of everything, so that every parameter has a gradient; a quarter of the samples come without their image.
CHAT = (
    "stages=[{name: one, mix: {scenes: 1}, drop_image: 25%, steps: 1, clip: null,"
    " train: {vision: {lr: 1e-2}, connector: {lr: 1e-2}, language: {lr: 1e-2}}}]"
)
FROZEN = CHAT.replace("vision: {lr: 1e-2}, ", "")
ALONE = FROZEN.replace("connector: {lr: 1e-2}, ", "")
TAGS = "stages=[{name: one, objective: tags, mix: {scenes: 1}, steps: 1, clip: null, train: {vision: {lr: 1e-2}}}]"
TAGS_DROPPED = TAGS.replace("steps: 1", "steps: 1, drop_image: 25%")
LAYOUTS = [(1, 8), (1, 2), (1, 1), (2, 2), (2, 1)]  # (world, micro-batch) of a global batch of 8

RECORD = """
import torch
from vlm.training.module import TrainingModule
from vlm.training.sharding import gathered

def record(self, optimizer):
    whole = {name: None if p.grad is None else gathered(p.grad) for name, p in self.named_parameters()}
    if self.trainer.is_global_zero:
        torch.save(whole, PATH)

TrainingModule.on_before_optimizer_step = record
"""
# Whatever the draw says: exactly the samples of the second rank's slots come without their images.
BLIND = """
from vlm.data.chat import ChatEncoder
from vlm.data.draw import Draw
encode = ChatEncoder.__call__

class Always:
    def random(self):
        return 0.0

def blind(self, sample, draw):
    luck = Draw(draw.position, draw.epoch, draw.seed)
    if draw.position % 8 >= 4:
        luck.__dict__["rng"] = Always()
    self.drop_image = 1e-9
    return encode(self, sample, luck)

ChatEncoder.__call__ = blind
"""

Gradients = dict[str, Tensor | None]
Measure = Callable[..., Gradients]


@pytest.fixture
def measure(ranks: Any, tmp_path: Path) -> Measure:
    """The gradients that the optimizer of a run's only step finds, by parameter."""

    def call(world: int, micro: int, stages: str, change: str = "", parallel: str = "ddp") -> Gradients:
        path = tmp_path / "gradients.pt"
        path.unlink(missing_ok=True)
        how = (f"run.micro_batch={micro}", f"run.parallel={parallel if world > 1 else 'single'}")
        group = ranks(world, stages, *how, "run.resume=never", change=_record(path) + change)
        assert group.join() == [0] * world, group.output()
        return torch.load(path, weights_only=True)

    return call


def _record(path: Path) -> str:
    return RECORD.replace("PATH", repr(str(path)))


def first_batch(recipe: Recipe, blind: range = range(0)) -> tuple[VisionLanguageModel, list[Example]]:
    """The untrained model and the global batch of step 0, sample by sample."""
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    store = Store(load_manifest(list(recipe.data.sources["scenes"].shards)))
    order = Order([len(store)], [1.0], recipe.seed)
    examples = []
    for position in range(recipe.run.global_batch):
        place = order.at(position)
        drop = 1.0 if position in blind else 0.0 if blind else recipe.stages[0].drop_image
        encoder = build_encoder(recipe, model, tokenizer, drop)
        examples.append(encoder(store.read(place.number), Draw(position, place.epoch, recipe.seed)))
    return model, examples


def chat_loss_of(model: VisionLanguageModel, example: Example) -> Tensor:
    """Sum of weighted cross-entropies of one sample, unpadded, with the Hugging Face model's own logits."""
    pieces, image_of = [], iter(example.images)
    places = []
    for token in example.tokens:
        if token == IMAGE_TOKEN:
            found = model.vision(next(image_of)[None])
            pieces.append(model.connector(found.tokens, found.grid)[0])
        else:
            pieces.append(model.language.get_input_embeddings()(torch.tensor([token])))
        places.append(sum(map(len, pieces)) - 1)
    logits = model.language(inputs_embeds=torch.cat(pieces)[None]).logits[0]
    terms = [
        weight * cross_entropy(logits[place - 1], torch.tensor(token))
        for token, weight, place in zip(example.tokens, example.weights, places, strict=True)
        if weight > 0
    ]
    return torch.stack(terms).sum()


def gradients_by_hand(recipe: Recipe, blind: range = range(0)) -> Gradients:
    model, examples = first_batch(recipe, blind)
    weight = sum(sum(example.weights) for example in examples)
    for example in examples:
        (chat_loss_of(model, example) / weight).backward()
    return {f"model.{name}": p.grad for name, p in model.named_parameters()}


def assert_equal(found: Gradients, expected: Gradients) -> None:
    assert {name for name, gradient in found.items() if gradient is not None} == {
        name for name, gradient in expected.items() if gradient is not None
    }
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_gradient_of_chat_is_that_of_the_global_batch_in_every_layout(measure: Measure, recipe: Path) -> None:
    loaded = load_recipe(recipe, [CHAT])
    examples = first_batch(loaded)[1]
    supervised = {sum(weight > 0 for weight in example.weights) for example in examples}
    assert max(supervised) > 2 * min(supervised)  # a mean of means would show
    assert {len(example.images) for example in examples} == {0, 1}
    expected = gradients_by_hand(loaded)
    assert max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None) > 0.05
    for world, micro in LAYOUTS:
        assert_equal(measure(world, micro, CHAT), expected)


def test_the_gradient_of_tags_is_that_of_the_global_batch_in_every_layout(measure: Measure, recipe: Path) -> None:
    loaded = load_recipe(recipe, [TAGS])
    expected = tags_by_hand(loaded)
    for world, micro in LAYOUTS:
        assert_equal(measure(world, micro, TAGS), expected)


def tags_by_hand(recipe: Recipe) -> Gradients:
    """Mean over the samples of the mean over the tags of the binary cross-entropy."""
    model, examples = first_batch(recipe)
    names = training.open_sources(recipe).tags
    training.seed_everything(recipe.seed, verbose=False)
    objective = TagsLoss(model.vision.dim, names, prior=1.0)
    for example in examples:
        for image in example.images:
            features = model.vision(image[None]).tokens[0]  # [patches, width]
            logit = (features @ objective.head.weight.T + objective.head.bias).exp().sum(0).log() - 1.0
            truth = torch.tensor([float(name in example.tags) for name in names])
            each = softplus(logit) - truth * logit
            (each.mean() / len(examples)).backward()
    for part in (model.connector, model.language):
        part.requires_grad_(False)
    return {f"model.{name}": p.grad for name, p in model.named_parameters()} | {
        f"objective.{name}": p.grad for name, p in objective.named_parameters()
    }


def test_tags_take_batches_without_an_image_on_any_rank(measure: Measure, recipe: Path) -> None:
    expected = tags_by_hand(load_recipe(recipe, [TAGS_DROPPED]))
    for world, micro in ((1, 8), (1, 1), (2, 1)):
        assert_equal(measure(world, micro, TAGS_DROPPED), expected)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("stages", [CHAT, FROZEN, ALONE], ids=["vision trained", "vision frozen", "language alone"])
def test_a_rank_that_sees_only_text_neither_hangs_nor_changes_the_gradient(
    stages: str, parallel: str, measure: Measure, recipe: Path
) -> None:
    expected = gradients_by_hand(load_recipe(recipe, [stages]), blind=range(4, 8))
    frozen = {CHAT: (), FROZEN: ("vision",), ALONE: ("vision", "connector")}[stages]
    expected = {name: None if name.split(".")[1] in frozen else g for name, g in expected.items()}
    for micro in (4, 2):
        assert_equal(measure(2, micro, stages, BLIND, parallel), expected)


FASTV = "prune={use: fastv, layer: 1, keep: 25%}"
DIVPRUNE = "prune={use: divprune, keep: 25%}"


@pytest.mark.parametrize(
    "prune", [FASTV, DIVPRUNE, "prune={use: stride, keep: 4}"], ids=["fastv", "divprune", "stride"]
)
def test_gradients_reach_every_part_under_a_pruner_and_do_not_depend_on_the_layout(
    prune: str, train: Any, recipe: Path, ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Gradients] = []

    def record(self: TrainingModule, optimizer: Any) -> None:
        found.append({name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None})

    monkeypatch.setattr(TrainingModule, "on_before_optimizer_step", record)
    train(CHAT, prune, to="one")
    assert all(float(gradient.abs().sum()) > 0 for gradient in found[0].values())
    assert {name.split(".")[1] for name in found[0]} == {"vision", "connector", "language"}
    train(CHAT, to="unpruned")
    assert any(not torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
    group = ranks(2, CHAT, prune, "run.micro_batch=1", change=_record(tmp_path / "g.pt"))  # some of text alone
    assert group.join() == [0, 0], group.output()
    assert_equal(torch.load(tmp_path / "g.pt", weights_only=True), found[0])


@pytest.mark.parametrize("keep", ["25%", "9"])
def test_the_kept_share_comes_down_by_its_schedule_and_the_program_is_off_afterwards(
    keep: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = f"prune={{use: stride, keep: {keep}, schedule: {{from: 100%, over: 50%}}}}"
    loaded = load_recipe(recipe, [FROZEN.replace("drop_image: 25%, steps: 1", "steps: 10"), prune])
    tokenizer = build_tokenizer(loaded)
    model = build_model(loaded, tokenizer)
    kept: list[int] = []
    forward = model.forward

    def counted(*arguments: Any) -> Any:
        out = forward(*arguments)
        [count] = set(out.layout.visual.sum(1).tolist())
        kept.append(count)
        return out

    monkeypatch.setattr(model, "forward", counted)
    training.train(loaded, model, tokenizer)
    # of 36 tokens: 100 %, 85 %, 70 %, 55 %, 40 %, and from half of the steps on 25 %
    assert kept == [36, 31, 25, 20, 14, 9, 9, 9, 9, 9]
    assert model.engine is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_program_is_taken_off_when_training_fails(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_recipe(recipe, [CHAT, FASTV])
    tokenizer = build_tokenizer(loaded)
    model = build_model(loaded, tokenizer)
    attention = model.language.config._attn_implementation
    attached: list[bool] = []

    def broken(self: ChatLoss, model: Any, batch: Any) -> Loss:
        attached.append(model.engine is not None)
        raise TrainingError("broken")

    monkeypatch.setattr(ChatLoss, "forward", broken)
    with pytest.raises(TrainingError, match="broken"):
        training.train(loaded, model, tokenizer)
    assert attached == [True]
    assert model.engine is None
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.language.config._attn_implementation == attention


def test_parts_that_are_not_named_stay_as_they_are_to_the_bit(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_recipe(recipe, ["stages.1.train={connector: {lr: 1e-2}}", "stages.1.steps=3"])
    tokenizer = build_tokenizer(loaded)
    model = build_model(loaded, tokenizer)
    states = [{name: value.clone() for name, value in model.state_dict().items()}]
    modes: list[tuple[bool, ...]] = []
    end = Watch.on_train_batch_end

    def noted(self: Watch, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        end(self, trainer, module, outputs, batch, index)
        modes.append(tuple(part.training for part in (model.vision, model.connector, model.language)))
        if batch.step + 1 == self.steps:
            states.append({name: value.clone() for name, value in model.state_dict().items()})

    monkeypatch.setattr(Watch, "on_train_batch_end", noted)
    training.train(loaded, model, tokenizer)
    untrained, tags, both = states
    for name in untrained:
        part = name.partition(".")[0]
        assert torch.equal(untrained[name], tags[name]) == (part != "vision"), name
        assert torch.equal(tags[name], both[name]) == (part != "connector"), name
    assert modes == [(True, False, False)] * 6 + [(False, True, False)] * 3


def test_the_plan_shows_what_will_train(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    model = build_model(loaded, build_tokenizer(loaded))
    rows = [line.split("  ") for line in plan(loaded).splitlines()]
    cells = {row[0]: [cell.strip() for cell in row[1:] if cell] for row in rows}
    assert cells["part"] == ["parameters", "tags", "sft"]
    for part, tags, sft in (
        ("vision", "lr 0.01, decay 0.01", "frozen"),
        ("connector", "frozen", "lr 0.01, decay 0.01"),
        ("language", "frozen", "lr 0.01, decay 0.01"),
    ):
        count = sum(p.numel() for p in getattr(model, part).parameters())
        assert cells[part] == [f"{count:,}", tags, sft]


def test_the_optimizer_is_told_the_rate_and_decay_of_each_part(recipe: Path) -> None:
    stage = "{vision: {lr: 1e-4, weight_decay: 0.1}, connector: {lr: 2e-3}, language: {lr: 3e-5, weight_decay: 0.2}}"
    loaded = load_recipe(recipe, [f"stages.0.train={stage}", "stages.0.betas=[0.8, 0.9]"])
    model = build_model(loaded, build_tokenizer(loaded))
    module = TrainingModule(model, ChatLoss(), "token", loaded.stages[0], 6, 8)
    optimizer = module.configure_optimizers()["optimizer"]
    of_part = {"vision": (1e-4, 0.1), "connector": (2e-3, 0.0), "language": (3e-5, 0.2)}
    seen = []
    for group in optimizer.param_groups:
        lr, decay = of_part[group["name"]]
        assert group["initial_lr"] == lr
        assert group["betas"] == (0.8, 0.9)
        for parameter in group["params"]:
            assert group["weight_decay"] == (decay if parameter.ndim > 1 else 0.0)
            seen.append(id(parameter))
    assert sorted(seen) == sorted(id(parameter) for parameter in model.parameters())


def test_the_course_of_the_learning_rate() -> None:
    cosine = Schedule(use="cosine", warmup=4, final=0.1)
    assert [rate(cosine, step, 20) for step in (0, 1, 3, 4)] == pytest.approx([0.25, 0.5, 1.0, 1.0])
    assert rate(cosine, 12, 20) == pytest.approx(0.1 + 0.9 * 0.5)  # half way between step 4 and step 20
    assert rate(cosine, 8, 20) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)))
    assert rate(cosine, 20, 20) == rate(cosine, 25, 20) == pytest.approx(0.1)
    linear = Schedule(use="linear", warmup=0.25, final=0.2)  # a quarter of 8 steps is 2
    found = [rate(linear, step, 8) for step in range(9)]
    expected = [0.5, 1.0, 1.0, 1 - 0.8 / 6, 1 - 1.6 / 6, 0.6, 1 - 3.2 / 6, 1 - 4 / 6, 0.2]
    assert found == pytest.approx(expected)
    constant = Schedule(use="constant", warmup=2)
    assert [rate(constant, step, 10) for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    assert [rate(Schedule(use="linear"), step, 4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


# One sample of the third step gives a loss that is not a finite number, or an infinite gradient.
BROKEN = """
import torch
from vlm.objectives.chat import ChatLoss
forward = ChatLoss.forward

def broken(self, model, batch):
    loss = forward(self, model, batch)
    if KEY not in batch.keys:
        return loss
    first = next(p for p in model.parameters() if p.requires_grad)
    value = {"loss": loss.value.detach() / 0.0, "gradient": loss.value + (first * 0.0).sum().sqrt()}["WHAT"]
    return loss._replace(value=value + 0.0 * loss.value)

ChatLoss.forward = broken
"""


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(("world", "parallel"), [(1, "single"), (2, "ddp"), (2, "fsdp2")])
def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_samples(
    what: str, world: int, parallel: str, train: Any, ranks: Any, tmp_path: Path
) -> None:
    whole = train(CHAT.replace("steps: 1", "steps: 4"), to="whole")
    keys = json.loads((whole / "samples.jsonl").read_text().splitlines()[2])["ids"]
    change = BROKEN.replace("KEY", repr(keys[6])).replace("WHAT", what)
    how = ("run.micro_batch=2", "run.save.every=1", f"run.parallel={parallel}")
    options = (CHAT.replace("steps: 1", "steps: 4"), *how)
    group = ranks(world, *options, change=change)
    assert group.join() == [2] * world, group.output()
    named = keys[6:8] if what == "loss" else keys
    line = f"error: stage one, step 2: expected a finite {what}, found one that is not; samples: {', '.join(named)}\n"
    assert line in group.output()
    assert "Traceback" not in group.output()
    saved = sorted((tmp_path / "run/checkpoints").iterdir())
    assert [path.name for path in saved] == ["stage0-one-step00000001.ckpt", "stage0-one-step00000002.ckpt"]
    state = torch.load(saved[-1], weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
