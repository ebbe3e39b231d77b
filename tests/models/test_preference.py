"""Preference losses against a restatement in double precision, one pair at a time, and by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.data.batch import Batch
from vlm.models.errors import ModelError
from vlm.models.lora import Lora, adapt, adapters, without_adapters
from vlm.models.program.perturb import cropped, diffused
from vlm.models.splice import IMAGE_TOKEN
from vlm.models.vision_language import Inputs
from vlm.objectives._preference import Preference, changed, evaluating, pair_loss, segment_weights
from vlm.objectives.dpo import Dpo
from vlm.objectives.ha_dpo import Hadpo
from vlm.objectives.mdpo import Mdpo
from vlm.objectives.povid import Povid
from vlm.objectives.rlaif_v import Rlaifv
from vlm.objectives.rlhf_v import Rlhfv


def half(make: Any, rows: tuple[str, ...], starts: tuple[int, ...], images: Any) -> Batch:
    """Rows as a batch in which everything from the start on is the answer."""
    inputs = make(*rows)
    weights = torch.zeros(inputs.tokens.shape)
    for row, (marks, start) in enumerate(zip(rows, starts, strict=True)):
        weights[row, start : len(marks)] = 1.0
    length = inputs.valid.sum(1)
    return Batch(
        inputs.tokens.masked_fill(~inputs.valid, 0),
        length,
        weights,
        inputs.images if images is None else images,
        inputs.owner,
        ["a", "b", "c"][: len(rows)],
        [()] * len(rows),
    )


@pytest.fixture
def pairs(batch: Any) -> Batch:
    """Three pairs over three images and one without an image; answers of different lengths."""
    chosen = half(batch, ("tt#tttt", "#t#tttttt", "ttttt"), (4, 5, 2), None)
    rejected = half(batch, ("tt#ttttt", "#t#tttt", "tttttt"), (4, 5, 2), chosen.images)
    for row, start in enumerate((4, 5, 2)):
        rejected.tokens[row, :start] = chosen.tokens[row, :start]
    # the second rejected answer shares three tokens with the chosen one, the first shares two, which is no match
    rejected.tokens[0, 5:7] = chosen.tokens[0, 4:6]
    rejected.tokens[2, 3:6] = chosen.tokens[2, 2:5]
    return replace(chosen, rejected=replace(rejected, keys=[f"{key}#0" for key in chosen.keys]))


@pytest.fixture
def model(make_model: Any) -> Any:
    return make_model(layers=2)


class Dense:
    """The loss written out, from dense logits of one row at a time."""

    def __init__(self, spliced: Any, by_hand: Any) -> None:
        self.spliced, self.by_hand = spliced, by_hand

    def logits(self, model: Any, batch: Batch, row: int, images: Tensor) -> tuple[Tensor, list[int]]:
        """Dense logits of one row, and the place in them that predicts each of its tokens."""
        valid = torch.arange(batch.tokens.shape[1]) < batch.length[:, None]
        x, _, token_of = self.spliced(model, Inputs(batch.tokens, valid, images, batch.image_owner), row)
        places, at = [], -1
        count = model.visual_tokens
        for token in batch.tokens[row][: int(batch.length[row])].tolist():
            at += count if token == IMAGE_TOKEN else 1
            places.append(at - 1 if token != IMAGE_TOKEN else at - count)
        assert len(token_of) == at + 1
        return self.by_hand(model, x), places

    def log_probs(
        self, model: Any, batch: Batch, row: int, images: Tensor, targets: list[int] | None = None
    ) -> list[Tensor]:
        """log p of each token of the answer in one row."""
        logits, places = self.logits(model, batch, row, images)
        learned = (batch.weights[row] > 0).nonzero().flatten().tolist()
        wanted = targets or [int(batch.tokens[row, place]) for place in learned]
        return [logits[places[p]].log_softmax(-1)[t] for p, t in zip(learned, wanted, strict=True)]

    def loss(self, model: Any, reference: Any, batch: Batch, terms: Preference) -> Tensor:
        """The sum over the pairs of all terms, each pair and each token by itself."""
        rejected = batch.rejected
        assert rejected is not None
        total = []
        for row in range(len(batch.keys)):
            factor = [
                segment_weights(*two, terms.segment_weight)[row] for two in ((batch, rejected), (rejected, batch))
            ]
            weights = [w[w > 0].double() for w in factor]

            def answer(which: Any, images: Tensor, side: int = 0, targets: Any = None, w: Any = None) -> Tensor:
                each = torch.stack(self.log_probs(which, (batch, rejected)[side], row, images, targets))  # noqa: B023
                w = weights[side] if w is None else w  # noqa: B023
                return (each * w).sum() / (w.sum() if terms.average else 1)

            def reward(*given: Any, **more: Any) -> Tensor:
                base = answer(reference, *given, **more).detach() if reference is not None else 0.0
                return terms.beta * (answer(model, *given, **more) - base)

            clean = batch.images
            margin = reward(clean) - reward(clean, side=1)
            loss = -(1 - terms.smoothing) * log_sigmoid(margin) - terms.smoothing * log_sigmoid(-margin)
            if terms.own_weight:
                noised = torch.stack([diffused(image, terms.own_step) for image in clean])
                logits, places = self.logits(model, batch, row, noised)
                learned = (batch.weights[row] > 0).nonzero().flatten().tolist()
                own = [int(logits[places[p]].argmax()) for p in learned]
                plain = torch.ones(len(own), dtype=torch.float64)
                other = reward(clean, targets=own, w=plain)
                loss = (1 - terms.own_weight) * loss - terms.own_weight * log_sigmoid(reward(clean) - other)
            if terms.image_weight and bool((batch.image_owner == row).any()):
                worse = torch.stack([cropped(image) for image in clean])
                loss = loss - terms.image_weight * log_sigmoid(reward(clean) - reward(worse))
            if terms.anchor_weight:
                loss = loss - terms.anchor_weight * log_sigmoid(reward(clean) - terms.anchor)
            if terms.lm_weight:
                each = torch.stack(self.log_probs(model, batch, row, clean))
                loss = loss - terms.lm_weight * each.mean()
            total.append(loss)
        return torch.stack(total).sum()


@pytest.fixture
def dense(spliced: Any, by_hand: Any) -> Dense:
    return Dense(spliced, by_hand)


def log_sigmoid(value: Tensor) -> Tensor:
    return -(1 + (-value).exp()).log()


TERMS = [
    Preference(beta=0.3, reference="none"),
    Preference(beta=0.3, reference="none", smoothing=0.1, average=True),
    Preference(beta=0.3, reference="none", segment_weight=3.0, lm_weight=0.5),
    Preference(beta=0.3, reference="none", image_weight=0.7, anchor_weight=0.4, anchor=0.2),
    Preference(beta=0.3, reference="adapter", own_weight=0.5, own_step=700),
    Preference(beta=0.3, reference="adapter", image_weight=1.0, segment_weight=2.0, average=True),
]


def with_adapters(model: Any) -> Any:
    """Adapters on the language model that change what it says."""
    part = model.parts["language"]
    adapt(part, "language", Lora(2, 8.0), model.head)
    for number, (_, value) in enumerate(adapters(part)):
        value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(number), dtype=value.dtype) * 0.1
    return model


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: ", ".join(f"{k}={v}" for k, v in vars(terms).items() if v))
def test_loss_and_gradient_are_those_of_every_pair_by_itself(
    terms: Preference, model: Any, make_model: Any, pairs: Batch, dense: Dense
) -> None:
    reference = None
    if terms.reference == "adapter":
        reference, model = make_model(layers=2), with_adapters(model)
    found = terms.build()(model, pairs)
    assert float(found.weight) == 3
    found.value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = dense.loss(model, reference, pairs, terms)
    expected.backward()
    # logits are taken in float32, as in every other loss
    torch.testing.assert_close(found.value.double(), expected, atol=0, rtol=1e-5)
    assert gradients
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_model_that_is_its_reference_has_a_loss_of_log_2_and_a_margin_of_0(model: Any, pairs: Batch) -> None:
    adapt(model.parts["language"], "language", Lora(2, 8.0), model.head)  # fresh, so they change nothing
    found = Preference(reference="adapter").build()(model, pairs)
    assert float(found.value.detach()) / 3 == pytest.approx(math.log(2), rel=1e-6)
    assert float(found.logs["margin"]) == 0 == float(found.logs["accuracy"])


def test_without_adapters_the_model_is_the_bare_model_to_the_bit_and_trains_as_before(
    make_model: Any, batch: Any
) -> None:
    inputs = batch("tt#tt", "t#t")
    bare = make_model(layers=2)(inputs).hidden
    model = with_adapters(make_model(layers=2))
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    frozen = next(name for name in trained if "lora_A" in name)
    dict(model.named_parameters())[frozen].requires_grad_(False)
    before = model(inputs).hidden
    with without_adapters(model):
        assert torch.equal(model(inputs).hidden, bare)
    assert torch.equal(model(inputs).hidden, before) and not torch.equal(before, bare)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {**trained, frozen: False}
    with pytest.raises(ModelError, match="expected a model with adapters"), without_adapters(make_model(layers=2)):
        pass


def test_the_reference_is_asked_without_dropout_and_modes_come_back(model: Any) -> None:
    model.train()
    model.vision.eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert model.training and not any(module.training for name, module in model.named_modules() if name)
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes


def test_pairs_do_not_depend_on_each_other_and_a_blank_counts_for_nothing(
    model: Any, pairs: Batch, dense: Dense
) -> None:
    terms = Preference(reference="none")
    together, alone = terms.build()(model, pairs), dense.loss(model, None, pairs, terms)
    assert float(together.value.detach()) == pytest.approx(float(alone.detach()), rel=1e-5)
    assert pairs.rejected is not None
    for one in (pairs, pairs.rejected):
        one.weights[1] = 0
    without = terms.build()(model, pairs)
    assert float(without.weight) == 2
    assert 0 < float(without.value.detach()) < float(together.value.detach())


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        # a red car stands there | a blue car stands there: only "red" was corrected, and "a" is shorter than three
        ("A r c s t", "A b c s t", [True, True, False, False, False]),
        ("a b c d", "a b c d", [False] * 4),
        ("a b c d", "x a b y", [True] * 4),
        ("w x a b c y", "a b c", [True, True, False, False, False, True]),
        # two stretches of three around an insertion
        ("a b c d e f", "a b c z d e f", [False] * 6),
        ("a b c z d e f", "a b c d e f", [False, False, False, True, False, False, False]),
    ],
)
def test_what_was_corrected(ours: str, theirs: str, expected: list[bool]) -> None:
    numbers = {word: n for n, word in enumerate(sorted({*ours.split(), *theirs.split()}))}
    assert changed([numbers[w] for w in ours.split()], [numbers[w] for w in theirs.split()]) == expected


def test_frequent_tokens_of_long_answers_are_matched_too() -> None:
    long = [1, 2] * 150
    assert changed(long, long) == [False] * 300


def test_corrected_tokens_weigh_more_by_hand(batch: Any) -> None:
    """Places 4 to 8 are the answers: 1 2 3 4 5 and 1 2 3 9 5; 1 2 3 is shared, 5 alone is too short to count."""
    one = half(batch, ("tt#tttttt",), (4,), None)
    other = replace(one, tokens=one.tokens.clone())
    one.tokens[0, 4:] = torch.tensor([1, 2, 3, 4, 5])
    other.tokens[0, 4:] = torch.tensor([1, 2, 3, 9, 5])
    for two in ((one, other), (other, one)):
        assert segment_weights(*two, 3.0)[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 3, 3]
    assert segment_weights(one, other, 1.0) is one.weights


def test_the_pair_loss_in_numbers() -> None:
    margin = torch.tensor([0.0, 2.0, -1.0])
    expected = [math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.e)]
    torch.testing.assert_close(pair_loss(margin), torch.tensor(expected))
    smooth = 0.9 * torch.tensor(expected) + 0.1 * pair_loss(-margin)
    torch.testing.assert_close(pair_loss(margin, 0.1), smooth)


@pytest.mark.bad_shape
def test_a_worse_image_is_a_small_piece_blown_up() -> None:
    ramp = torch.arange(48.0).expand(3, 48, 48)
    for seed in range(5):
        worse = cropped(ramp + seed)
        assert worse.shape == ramp.shape and torch.equal(worse, cropped(ramp + seed))
        assert float(worse.max() - worse.min()) <= 48 * 0.2**0.5
    with pytest.raises(ModelError, match="expected pixels"):
        cropped(torch.zeros(4, 8))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Dpo(), Preference()),
        (Hadpo(lm_weight=0.5), Preference(lm_weight=0.5)),
        (Rlhfv(), Preference(segment_weight=3.0)),
        (Rlaifv(), Preference()),
        (Mdpo(), Preference(image_weight=1.0, anchor_weight=1.0)),
        (Povid(), Preference(reference="adapter", own_weight=0.5)),
    ],
)
def test_every_name_is_a_choice_of_terms(objective: Any, expected: Preference) -> None:
    assert objective.build(None, ()).terms == expected
    assert objective.per == "sample" and objective.pairs


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (Preference(beta=0.0), "beta: expected a number above 0"),
        (Preference(smoothing=0.5), "smoothing: expected a share"),
        (Preference(own_weight=0.5), "take reference: adapter"),
    ],
)
def test_terms_that_make_no_loss(terms: Preference, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        terms.build()
