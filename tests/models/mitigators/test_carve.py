"""CARVE: watching two answers, connected regions, cut-outs, and what becomes of the prompt."""

from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from vlm.models.decoders.beam import Beam
from vlm.models.errors import ModelError
from vlm.models.mitigators.carve import Carve
from vlm.models.mitigators.vcd import Vcd
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate
from vlm.models.program.looks import looks
from vlm.models.program.program import Prepare
from vlm.models.program.regions import box_of, components, keep_regions, lanczos, like_picture, resized
from vlm.models.pruners.fastv import Fastv

ROWS = ("tt#ttt", "#t#tttt", "ttt")
CARVE = Carve(top=0.3, regions=2, layers=(1, 2), steps=3, tokens=(5, 6, 7), closing=1)


def flooded(mask: torch.Tensor) -> list[set[tuple[int, int]]]:
    """Pieces by walking from pixel to pixel."""
    left = {(r, c) for r, c in mask.nonzero().tolist()}
    pieces = []
    while left:
        todo, piece = [min(left)], set()
        while todo:
            r, c = todo.pop()
            if (r, c) in left:
                left.remove((r, c))
                piece.add((r, c))
                todo += [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
        pieces.append(piece)
    return pieces


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 0.65, 1.0])
def test_pieces_are_those_of_walking(share):
    mask = torch.rand(23, 31, generator=torch.Generator().manual_seed(3)) < share
    label, count = components(mask)
    expected = flooded(mask)
    assert count == len(expected)
    for number, piece in enumerate(expected, start=1):
        assert {tuple(place) for place in (label == number).nonzero().tolist()} == piece
    assert not label[~mask].any()


def test_a_spiral_is_one_piece():
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()
    assert components(mask)[1] == 1
    assert components(torch.eye(4).bool())[1] == 4  # corners do not join


@pytest.mark.parametrize(("top", "count"), [(0.2, 1), (0.3, 2), (0.7, 3), (0.45, 50)])
def test_kept_regions_are_those_with_the_largest_sums(top, count):
    scores = torch.rand(17, 19, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got = keep_regions(scores, top, count)
    mask = scores >= float(numpy.percentile(scores.numpy(), (1 - top) * 100))
    pieces = sorted(flooded(mask), key=lambda piece: -sum(float(scores[place]) for place in piece))
    kept = set().union(*pieces[: max(count, int(len(pieces) * top))])
    assert {tuple(place) for place in got.nonzero().tolist()} == kept


def test_boxes():
    mask = torch.zeros(10, 20).bool()
    assert box_of(mask) == (0, 0, 10, 20)
    mask[2, 3], mask[4, 9] = True, True
    assert box_of(mask) == (2, 3, 5, 10)
    for box in ((2, 3, 5, 10), (0, 18, 9, 20), (9, 0, 10, 1), (0, 0, 10, 20)):
        top, left, bottom, right = like_picture(box, 10, 20)
        assert top <= box[0] and left <= box[1] and bottom >= box[2] and right >= box[3]
        assert min(top, left) >= 0 and bottom <= 10 and right <= 20
        assert right - left == 2 * (bottom - top) or right - left == 2 * (bottom - top) - 1


@pytest.mark.parametrize("size", [(30, 33), (11, 7), (5, 40)])
def test_lanczos_is_that_of_pillow(size):
    g = torch.Generator().manual_seed(2)
    pixels = torch.rand(1, 12, 15, generator=g)
    picture = Image.fromarray(pixels[0].numpy(), mode="F").resize((size[1], size[0]), Image.Resampling.LANCZOS)
    torch.testing.assert_close(lanczos(pixels, size)[0], torch.from_numpy(numpy.array(picture)), rtol=1e-4, atol=1e-5)


def seen_by_hand(model: Any, spliced: Any, by_hand: Any, inputs: Any, layers: Any, steps: int, stop: int) -> Any:
    """[steps, layers, visual] of one row, every token from nothing; the tokens."""
    x, image, _ = spliced(model, inputs)
    maps, tokens = [], []
    for _ in range(steps):
        attention: dict[int, Any] = {}
        logits = by_hand(model, x, edit=lambda n, x, p, a, into=attention: into.setdefault(n, a))
        seen = torch.cat([image, image.new_full((len(x) - len(image),), -1)]) >= 0
        maps.append(torch.stack([attention[n][:, -1].mean(0)[seen] for n in layers]))
        tokens.append(int(logits[-1].argmax()))
        if tokens[-1] == stop:
            break
        x = torch.cat([x, model.language.get_input_embeddings()(torch.tensor(tokens[-1:]))])
    return torch.stack(maps), tokens


@torch.no_grad()
def test_looks_equal_recomputing_everything(make_model, batch, alone, spliced, by_hand):
    model, inputs = make_model(), batch(*ROWS, side="left")
    stop = generate(model, alone(inputs, 0), max_new_tokens=3, stop=99)[0][1]
    with attach(model, Fastv(Budget.parse("25%")).program(model.facts)):  # rests meanwhile
        got = looks(model, inputs, (3, 1), 4, stop)
    for b in range(2):
        maps, tokens = seen_by_hand(model, spliced, by_hand, alone(inputs, b), (1, 3), 4, stop)
        steps = len(maps)
        torch.testing.assert_close(got.maps[:steps, :, b, : maps.shape[2]], maps, rtol=0, atol=1e-12)
        assert got.tokens[b, :steps].tolist() == tokens
        assert got.real[:, b].sum() == steps
    assert not got.maps[:, :, 2].any()
    assert got.real[:, 0].sum() == 2
    grids = got.on_grids(got.maps[0, 0])
    assert [tuple(grid.shape) for grid in grids] == [(6, 6)] * 3
    torch.testing.assert_close(torch.cat([g.flatten() for g in grids[1:]]), got.maps[0, 0, 1])
    with pytest.raises(ModelError, match=r"^layers: expected decoder layers 0..3; found 4"):
        looks(model, inputs, (4,), 1)


@torch.no_grad()
def carved(model: Any, spliced: Any, by_hand: Any, row: Any, stop: int) -> torch.Tensor:
    """The pictures of one row as CARVE restates them: cut down, one pixel at a time."""
    text = row.tokens[0].tolist()
    last = max(place for place, token in enumerate(text) if token == -1)
    about = torch.tensor([[*text[: last + 1], 5, 6, 7, text[-1]]])
    pair = []
    for tokens in (row.tokens, about):
        asks = row._replace(tokens=tokens, valid=torch.ones_like(tokens).bool())
        pair.append(seen_by_hand(model, spliced, by_hand, asks, (1, 2), 3, stop)[0])
    total: Any = 0
    for t in range(min(map(len, pair))):
        total = total + (t + 1) * (pair[0][t] / (pair[1][t] + 1e-8)).sum(0)
    pictures = []
    for n, pixels in enumerate(row.images):
        scores = resized(total[36 * n : 36 * (n + 1)].reshape(6, 6), (48, 48))
        mask = scores >= float(numpy.percentile(scores.numpy(), 70))
        pieces = sorted(flooded(mask), key=lambda piece: -sum(float(scores[place]) for place in piece))
        kept = torch.zeros(48, 48)
        for place in set().union(*pieces[: max(2, int(len(pieces) * 0.3))]):
            kept[place] = 1
        rows, cols = kept.any(1).nonzero()[:, 0], kept.any(0).nonzero()[:, 0]
        box = like_picture((int(rows[0]), int(cols[0]), int(rows[-1]) + 1, int(cols[-1]) + 1), 48, 48)
        part = (pixels * kept)[:, box[0] : box[2], box[1] : box[3]].float().numpy()
        big = [Image.fromarray(p, mode="F").resize((48, 48), Image.Resampling.LANCZOS) for p in part]
        pictures.append(torch.from_numpy(numpy.stack([numpy.array(p) for p in big])).double())
    return torch.stack(pictures)


def test_the_pictures_are_cut_down_to_what_the_question_is_about(make_model, batch, alone, spliced, by_hand):
    model, inputs = make_model(), batch(*ROWS, side="left")
    ((_, op),) = CARVE.program(model.facts)
    assert isinstance(op, Prepare)
    # the engine is needed for the attention to be seen, whatever is attached
    with attach(model, CARVE.program(model.facts)):
        got = op.change(model, inputs, 99)
    expected = torch.cat([carved(model, spliced, by_hand, alone(inputs, b), 99) for b in range(2)])
    torch.testing.assert_close(got.images, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.tokens, inputs.tokens) and not torch.allclose(got.images, inputs.images, atol=0.1)


@pytest.mark.parametrize("form", ["replace", "append"])
@pytest.mark.parametrize("decoder", [None, Beam(2)], ids=["greedy", "beam"])
def test_a_batch_equals_single_samples_under_pruners_and_other_streams(make_model, batch, alone, form, decoder):
    rows = ROWS if form == "replace" else ("tt#ttt", "#tttt", "ttt")
    model, inputs = make_model(), batch(*rows, side="left")
    method = Carve(0.3, 2, (1, 2), 3, tokens=(5, 6, 7), closing=1, form=form)
    others = Fastv(Budget.parse("50%")).program(model.facts) + Vcd(alpha=2.0, step=900).program(model.facts)
    options: Any = {"max_new_tokens": 4, "stop": 11, "decoder": decoder}
    with attach(model, others):
        plain = generate(model, inputs, **options)
    with attach(model, method.program(model.facts) + others):
        answers = generate(model, inputs, **options)
        assert answers == [generate(model, alone(inputs, b), **options)[0] for b in range(3)]
    assert answers[2] == plain[2] and answers != plain


def test_appending_shows_both_pictures(make_model, batch):
    model, inputs = make_model(), batch("tt#ttt", "ttt", "#ttttt")
    made = {}
    for form in ("replace", "append"):
        method = Carve(0.3, 2, (1, 2), 3, tokens=(5, 6, 7), closing=1, form=form)  # type: ignore[arg-type]
        with attach(model, method.program(model.facts)):
            made[form] = method.program(model.facts)[0][1].change(model, inputs, 99)  # type: ignore[union-attr]
    assert torch.equal(made["append"].images[0::2], inputs.images)
    assert torch.equal(made["append"].images[1::2], made["replace"].images)
    assert made["append"].visual.sum(1).tolist() == [2, 0, 2]


def test_neutral_and_refused_settings(make_model, batch):
    model = make_model()
    assert Carve(top=1.0).program(model.facts) == ()
    for bad, message in (
        ({"top": 0.0}, r"^carve.top: expected a share above 0 and up to 1; found 0"),
        ({"regions": 0}, r"^carve: expected at least 1 of regions and steps; found 0 and 32"),
        ({"layers": (2, 4)}, r"^carve.layers: expected first and last of 0..3; found 2, 4"),
        ({}, r"^carve.general: this model comes without its tokenizer"),
    ):
        with pytest.raises(ModelError, match=message):
            Carve(**bad).program(model.facts)  # type: ignore[arg-type]
    with (
        attach(model, Carve(tokens=(5,)).program(model.facts)),
        pytest.raises(ModelError, match=r"^carve.closing: nobody told this model how its prompts end"),
    ):
        generate(model, batch("t#t"), max_new_tokens=1, stop=9)
