"""ARA: features, the index, who asks for captions, and the mixture."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlm.models.decoders.beam import Beam
from vlm.models.errors import ModelError
from vlm.models.mitigators.ara import Ara
from vlm.models.program.artifact import Calibration
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate, open_streams
from vlm.models.program.retrieval import Captions, Retrieved, encoder_of, image_features, load_captions
from vlm.models.program.streams import Streams
from vlm.models.pruners.fastv import Fastv

ROWS = ("tt#ttt", "#t#tttt", "ttt")
TEXTS = ("a b", "c d e", "a b", "f", "g h")


def ids(text: str) -> list[int]:
    return [ord(word[0]) % 40 for word in text.split()]


@pytest.fixture
def model(make_model) -> Any:
    found = make_model()
    found.tokenize = ids
    return found


@pytest.fixture
def index(model, tmp_path, batch) -> str:
    """Five pictures; the second and the fourth are those of the batch that is asked about."""
    path = tmp_path / "captions.safetensors"
    own = image_features(model, batch(*ROWS, side="left"))
    noise = torch.randn(5, own.shape[1], generator=torch.Generator().manual_seed(1)) * own.std()
    noise[1], noise[3] = own[0], own[2]
    Captions(noise, list(TEXTS), encoder_of(model)).save(path)
    return str(path)


def by_cosine(features: torch.Tensor, stored: torch.Tensor, count: int) -> list[str]:
    a, b = features - stored.mean(0), stored - stored.mean(0)
    scores = [max(float(x @ y / x.norm() / y.norm()) for x in a) for y in b]
    found: list[str] = []
    for place in sorted(range(len(b)), key=lambda n: -scores[n]):
        found += [TEXTS[place]] if TEXTS[place] not in found else []
    return found[:count]


def test_features_are_means_of_an_images_tokens(model, batch, alone, spliced):
    inputs = batch(*ROWS, side="left")
    with attach(model, Fastv(Budget.parse("25%")).program(model.facts)):  # rests meanwhile
        got = image_features(model, inputs)
    x, image, _ = spliced(model, inputs, 1)
    torch.testing.assert_close(got[1:], torch.stack([x[image == n].mean(0) for n in (0, 1)]).float())
    assert image_features(model, batch("ttt")).shape == (0, 32)


def test_the_nearest_captions(model, index, batch):
    features, captions = image_features(model, batch(*ROWS, side="left")), load_captions(index)
    assert captions.nearest(features[:1], 4)[0] == "c d e" and captions.nearest(features[2:], 4)[0] == "f"
    for some in (features[:1], features[1:]):
        for count in (1, 3, 9):
            assert captions.nearest(some, count) == by_cosine(some, captions.features, count)


def test_the_index_is_refused_for_another_encoder_and_anything_else(model, index, batch, tmp_path):
    inputs = batch("tt#t")
    with torch.no_grad():
        next(model.vision.parameters()).add_(1)
    with (
        attach(model, Ara(Calibration(index), below=1e9).program(model.facts)),
        pytest.raises(ModelError, match=r"expected an index of this model's encoder \([0-9a-f]{16}\); found one of "),
    ):
        generate(model, inputs, max_new_tokens=1, stop=9)
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    for path, message in (
        (other, "expected an index of captions; found another file"),
        (Path("no"), "expected an ind"),
    ):
        with pytest.raises(ModelError, match=message):
            load_captions(str(path))


def mixture(model: Any, index: str, row: Any, tokens: list[int], below: float, share: float) -> tuple[Any, bool]:
    """Log-probabilities after ``tokens``, every context run alone and without caches."""

    def after(inputs: Any) -> torch.Tensor:
        text = torch.cat([inputs.tokens, torch.tensor([tokens], dtype=torch.long)], 1)
        return model.prefill(inputs._replace(tokens=text, valid=torch.ones_like(text).bool()))[0][0]

    p, u = (model.prefill(x)[0][0].softmax(-1) for x in (row, row.without_images()))
    asks = bool(len(row.images)) and float((p * (p / u).log()).sum()) < below
    other = row
    if asks:
        captions = by_cosine(image_features(model, row), load_captions(index).features, 2)
        text = row.tokens[0].tolist()
        last = max(n for n, token in enumerate(text) if token == -1)
        new = torch.tensor([[*text[: last + 1], *ids(" ".join(["see:", *captions])), *text[last + 1 :]]])
        other = row._replace(tokens=new, valid=torch.ones_like(new).bool())
    return ((1 - share) * after(row).softmax(-1) + share * after(other).softmax(-1)).log(), asks


@torch.no_grad()
def test_the_mixture_is_that_of_two_prompts(model, index, batch, alone):
    inputs = batch(*ROWS, side="left")
    logits, blind = model.prefill(inputs)[0], model.prefill(inputs.without_images())[0]
    shifts = (logits.softmax(-1) * (logits.log_softmax(-1) - blind.log_softmax(-1))).sum(-1)
    below = float(shifts[:2].mean())  # one row with images asks, the other does not
    asked = []
    with attach(model, Ara(Calibration(index), 2, below, 0.3, "see:").program(model.facts)):
        streams = Streams(model, *open_streams(model, inputs))
        for token in (3, 4):
            streams.step(torch.full((3,), token))
        got = streams.rewritten(model.engine.rewrites)
    for b in range(3):
        expected, asks = mixture(model, index, alone(inputs, b), [3, 4], below, 0.3)
        asked.append(asks)
        torch.testing.assert_close(got[b], expected, rtol=0, atol=1e-9)
    assert sorted(asked) == [False, False, True] and not asked[2]


@pytest.mark.parametrize("decoder", [None, Beam(2)], ids=["greedy", "beam"])
def test_a_batch_equals_single_samples_under_a_pruner(model, index, batch, alone, decoder):
    inputs = batch(*ROWS, side="left")
    cut = Fastv(Budget.parse("25%")).program(model.facts)
    options: Any = {"max_new_tokens": 5, "stop": 11, "decoder": decoder}
    with attach(model, cut + Ara(Calibration(index), below=1e9, share=0.9).program(model.facts)):
        answers = generate(model, inputs, **options)
        assert answers == [generate(model, alone(inputs, b), **options)[0] for b in range(3)]
    with attach(model, cut):
        plain = generate(model, inputs, **options)
    assert answers[2] == plain[2] and answers != plain


def test_who_is_sure_is_left_alone(model, index, batch):
    inputs = batch(*ROWS, side="left")
    retrieved = Retrieved(index, 2, -1.0, "see:")
    _, streams = open_streams(model, inputs)
    assert retrieved.inputs(model, inputs, streams["main"].run) is inputs


def test_neutral_and_refused_settings(make_model, index, batch):
    model = make_model()
    assert (
        Ara(Calibration(index), share=0.0).program(model.facts)
        == ()
        == Ara(Calibration(index), below=0.0).program(model.facts)
    )
    for bad, message in (
        ({"share": 1.0}, r"^ara.share: expected a weight from 0 and below 1; found 1"),
        ({"count": 0}, r"^ara.count: expected at least 1 caption; found 0"),
    ):
        with pytest.raises(ModelError, match=message):
            Ara(Calibration(index), **bad).program(model.facts)  # type: ignore[arg-type]
    with (
        attach(model, Ara(Calibration(index)).program(model.facts)),
        pytest.raises(ModelError, match=r"^ara: captions are text, and this model comes without its tokenizer"),
    ):
        generate(model, batch("t#t"), max_new_tokens=1, stop=9)
