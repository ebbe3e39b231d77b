"""The gradient of a step is that of the whole global batch, however it is split, and as computed sample by sample."""

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
from vlm.objectives.tags import TagsLoss
from vlm.recipe import load_recipe
from vlm.recipe.schema import Recipe
from vlm.training import train as training

# One step of everything, so that every parameter has a gradient; a quarter of the samples come without their image.
CHAT = (
    "stages=[{name: one, mix: {scenes: 1}, drop_image: 25%, steps: 1, clip: null,"
    " train: {vision: {lr: 1e-2}, connector: {lr: 1e-2}, language: {lr: 1e-2}}}]"
)
FROZEN = CHAT.replace("vision: {lr: 1e-2}, ", "")
TAGS = "stages=[{name: one, objective: tags, mix: {scenes: 1}, steps: 1, clip: null, train: {vision: {lr: 1e-2}}}]"
TAGS_DROPPED = TAGS.replace("steps: 1", "steps: 1, drop_image: 25%")
LAYOUTS = [(1, 8), (1, 2), (1, 1), (2, 2), (2, 1)]  # (world, micro-batch) of a global batch of 8

RECORD = """
import torch
from vlm.training.module import TrainingModule

def record(self, optimizer):
    torch.save({name: p.grad for name, p in self.named_parameters()}, PATH)

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

    def call(world: int, micro: int, stages: str, change: str = "") -> Gradients:
        path = tmp_path / "gradients.pt"
        path.unlink(missing_ok=True)
        group = ranks(world, stages, f"run.micro_batch={micro}", "run.resume=never", change=_record(path) + change)
        assert group.join() == [0] * world, group.output()
        return torch.load(path)

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


@pytest.mark.parametrize("stages", [CHAT, FROZEN], ids=["vision trained", "vision frozen"])
def test_a_rank_that_sees_only_text_neither_hangs_nor_changes_the_gradient(
    stages: str, measure: Measure, recipe: Path
) -> None:
    expected = gradients_by_hand(load_recipe(recipe, [stages]), blind=range(4, 8))
    if stages == FROZEN:
        expected = {name: None if name.startswith("model.vision.") else g for name, g in expected.items()}
    assert_equal(measure(2, 4, stages, BLIND), expected)
    assert_equal(measure(2, 2, stages, BLIND), expected)
