"""Debiased attention in the vision encoder: every pruner that ranks patches by attention, against dense rankings."""

import importlib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm
from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias, PatchPlace, PatchShown
from vlm.models.program.program import VIT_OUT, Select, Selector, Tokens, check, vit_after
from vlm.models.program.select import Ranking, even_stride, top
from vlm.models.program.signals import OneHeadClassRow, PatchAttention, PatchKeys, Signal
from vlm.models.program.vision import VisionEngine

PLACE = torch.arange(36)
# Options under which each pruner's choice is nothing but its ranking, and the block that ranks.
PLAIN: dict[str, tuple[dict[str, Any], int]] = {
    "agilepruner": ({"slope": 0.0}, 3),
    "hired": ({}, 3),
    "holov": ({"chunks": 1}, 3),
    "prumerge": ({}, 3),
    "prumerge_plus": ({"outstanding": 1.0}, 3),
    "vispruner": ({"ratio": 1.0}, 3),
    "visionzip": ({"contextual": 0.0}, 3),
    "vscan": ({"language": False, "local": 0.0, "early": 1}, 3),
    "vscan, windows": ({"language": False, "local": 1.0, "early": 1}, 1),
}


def pruner(name: str, keep: Any, debias: Debias | None = None, **options: Any) -> Any:
    name = name.split(",")[0]
    module = importlib.import_module(f"vlm.models.pruners.{name}")
    method = next(c for c in vars(module).values() if getattr(c, "__name__", "").lower() == name.replace("_", ""))
    option = "debias_encoder" if name == "vscan" else "debias"
    return method(keep=keep, **{option: debias}, **options)


def dense(seen: Any, name: str, block: int) -> Tensor:
    """The attention by which a pruner ranks, [images, patches]: all heads as one for PruMerge."""
    if not name.startswith("prumerge"):
        return seen.class_row(block)
    q, k = (x.transpose(1, 2).flatten(2) for x in seen.blocks[block][:2])
    return (q[:, :1] @ k.transpose(1, 2) * q.shape[2] ** -0.5).softmax(2)[:, 0, 1:]


def pad(model: Any, images: Tensor, number: int, top: int, bottom: int, left: int = 0) -> Tensor:
    """Border of the mean colour around a picture, in pixels: ``shown`` says which of the 6 x 6 patches are left."""
    mean, std = (torch.tensor(x).double()[:, None, None] for x in (model.vision.image.mean, model.vision.image.std))
    fill = ((mean * 255).round() / 255 - mean) / std
    images[number, :, :top] = images[number, :, 48 - bottom :] = images[number, :, :, :left] = fill
    rows, cols = (torch.arange(6) * 8 + 4 for _ in range(2))  # a patch counts if its middle row and column show
    return ((rows >= top) & (rows < 48 - bottom))[:, None] * (cols >= left)[None] > 0


@pytest.mark.parametrize("sigma", [2.5, None])
@pytest.mark.parametrize("name", PLAIN)
def test_the_choice_is_of_attention_less_its_rise_over_the_view(clear, batch, by_eye, name, sigma):
    model, inputs = clear(), batch("tt#tt", "#t#t")
    (options, block), x = PLAIN[name], PLACE / 35
    weight = torch.exp(-2.5 * x) if sigma else 1 / (1 + 1.73373862 * x - 4.82643345 * x**2 + 4.88412565 * x**3)
    score = dense(by_eye.look(model, inputs.images), name, block)
    count, rest = 10, name.startswith("prumerge")
    with (
        torch.no_grad(),
        attach(model, pruner(name, Budget(tokens=count), Debias(sigma), **options).program(model.facts)),
    ):
        layout = model(inputs).layout
    moved = False
    for image in range(3):
        expected = by_eye.best(score[image] * weight, count - rest)
        plain = by_eye.best(score[image], count - rest)
        found = by_eye.places(layout, image)
        assert len(found) == count and set(expected) <= set(found)
        moved |= sorted(expected) != sorted(plain)
    assert moved


@pytest.mark.parametrize("name", PLAIN)
def test_padding_goes_first_and_stays_only_beyond_the_picture(clear, batch, alone, by_eye, name):
    model, inputs = clear(), batch("tt#tt", "#t#t")
    shown = [pad(model, inputs.images, 0, 16, 8), torch.ones(6, 6), pad(model, inputs.images, 2, 11, 0, 24)]
    shown = [one.flatten().bool() for one in shown]
    assert [int(one.sum()) for one in shown] == [18, 36, 15]
    (options, block), debias = PLAIN[name], Debias(1.5, 0.5)
    score = dense(by_eye.look(model, inputs.images), name, block) * torch.exp(-1.5 * PLACE / 35)
    rest = name.startswith("prumerge")

    def run(keep: int, inputs: Any, how: Debias) -> Any:
        with torch.no_grad(), attach(model, pruner(name, Budget(tokens=keep), how, **options).program(model.facts)):
            return model(inputs)

    out = run(12, inputs, debias)
    for image in range(3):
        expected = by_eye.best(score[image], 12 - rest, shown[image].nonzero().flatten().tolist())
        found = by_eye.places(out.layout, image)
        assert len(found) == 12 and set(expected) <= set(found) and bool(shown[image][found].all())
    for b in range(2):  # and in a batch as alone
        single = run(12, alone(inputs, b), debias)
        hidden = out.hidden[b][out.layout.valid[b]]
        torch.testing.assert_close(hidden, single.hidden[0], rtol=0, atol=1e-9)
    more = run(20, inputs, debias).layout
    for image in range(3):
        found = by_eye.places(more, image)
        whole = shown[image].nonzero().flatten().tolist()
        assert len(found) == 20
        assert set(whole) <= set(found) if image != 1 else set(found) <= set(whole)


@pytest.mark.parametrize("name", [name for name in PLAIN if "," not in name])
def test_a_sigma_of_zero_changes_nothing_to_the_bit(clear, batch, name):
    model, inputs = clear(), batch("tt#tt", "#t#t")
    outs = []
    for debias in (None, Debias(0.0), Debias(0.0, 0.5)):  # noise has no padding
        with torch.no_grad(), attach(model, pruner(name, Budget(tokens=9), debias).program(model.facts)):
            outs.append(model(inputs))
    for out in outs[1:]:
        assert torch.equal(out.hidden, outs[0].hidden)
        assert torch.equal(out.layout.source, outs[0].layout.source)


def fake(x: Tensor, shown: Tensor | None, seed: int = 0) -> Callable[[Signal], Tensor]:
    """Signals of two views of 36 patches, or of the patches ``shown`` of them with their weight in the attention."""
    g = torch.Generator().manual_seed(seed)
    heads = torch.rand(2, 4, 36, generator=g, dtype=torch.float64)
    keys = torch.randn(2, 4, 36, 3, generator=g, dtype=torch.float64)
    one, early = heads.square().mean(1), heads.flip(2)
    weight = torch.exp(-1.5 * PLACE / 35)

    def read(signal: Signal) -> Tensor:
        if isinstance(signal, PatchPlace):
            return (PLACE / 35).expand(2, 36)
        if isinstance(signal, PatchShown):
            return SHOWN_HALF.float()
        if isinstance(signal, PatchKeys):
            return keys if shown is None else keys.transpose(1, 2)[shown].view(2, -1, 4, 3).transpose(1, 2)
        if isinstance(signal, OneHeadClassRow):
            return one if shown is None else (one * weight)[shown].view(2, -1)
        assert isinstance(signal, PatchAttention)
        value = heads if signal.layer == 3 else early
        return value if shown is None else (value * weight).transpose(1, 2)[shown].view(2, -1, 4).transpose(1, 2)

    return read


# Two views of 6 x 6 patches, of which rows 1 to 4 and columns 1 to 4 show the picture.
SHOWN_HALF = torch.zeros(2, 6, 6)
SHOWN_HALF[0, 1:5] = 1
SHOWN_HALF[1, :, 1:5] = 1
SHOWN_HALF = SHOWN_HALF.flatten(1)


WHOLE = [(name, keep) for name in PLAIN if "," not in name for keep in (9, 16)]


@pytest.mark.parametrize(("name", "keep"), [*WHOLE, ("prumerge", None), ("prumerge_plus", None)])
def test_the_whole_method_acts_as_if_padding_were_not_there(clear, by_eye, name, keep):
    """Its windows, chunks, diversity, even steps, quartiles and contextual tokens too."""
    facts, options = clear().facts, {"language": False, "early": 1, "window": 3} if name == "vscan" else {}
    g = torch.Generator().manual_seed(5)
    x, shown = torch.randn(2, 36, 8, generator=g, dtype=torch.float64), SHOWN_HALF > 0
    budget = None if keep is None else Budget(tokens=keep)
    whole = by_eye.given(x, fake(x, None), 6)
    part = by_eye.given(x[shown].view(2, 24, 8), fake(x, shown), 6)
    raster = PLACE.expand(2, 36)[shown].view(2, 24)
    part = replace(part, row=raster // 6, col=raster % 6)
    found, merged = by_eye.apply(pruner(name, budget, Debias(1.5, 0.5), **options).program(facts), whole)
    expected, theirs = by_eye.apply(pruner(name, budget, **options).program(facts), part)
    assert torch.equal(found[shown].view(2, 24), expected)
    assert not found[~shown].any() and found.any(1).all()
    if merged is not None and not name.startswith("prumerge"):  # whose weights are the attention itself
        torch.testing.assert_close(merged.features, theirs.features)
        assert torch.equal(merged.place, raster.gather(1, theirs.place))


def test_padding_has_no_vote_for_the_tiles_of_a_picture(clear, by_eye):
    """Two tiles, the lower half of the whole picture is padding: all of the tiles' budget goes to the upper one."""
    x, image = torch.zeros(3, 36, 2), torch.tensor([0, 0, 0])
    shown = (PLACE < 18).float().expand(3, 36)
    late = PLACE.flip(0).float() + 1

    def read(signal: Signal) -> Tensor:
        if isinstance(signal, PatchAttention):
            return (late if signal.layer == 3 else PLACE + 1.0).expand(3, 1, 36)
        return shown if isinstance(signal, PatchShown) else (PLACE / 35).expand(3, 36)

    tokens = by_eye.given(x, read, 6, image)
    for debias, quotas in ((None, [9, 0, 9]), (Debias(0.0, 0.5), [9, 9, 0])):
        program = pruner("hired", Budget(tokens=6), debias).program(clear().facts)
        kept = program[0][1].selector.choose(tokens, torch.tensor([6, 6, 6]))
        assert kept.sum(1).tolist() == quotas
        assert not kept[:, 18:].any() or debias is None


@pytest.mark.parametrize("keep", [8, 30])
def test_places_are_those_before_any_cut(make_model, batch, keep):
    model, inputs, seen = make_model(class_token=True, blocks=4), batch("tt#tt", "#t#t"), []
    shown = pad(model, inputs.images, 1, 8, 16)

    def choose(tokens: Tokens, count: Tensor) -> Tensor:
        seen.append((tokens, tokens.signal(PatchPlace()), tokens.signal(PatchShown())))
        return top(tokens.signal(PatchPlace()), tokens.valid, count)

    needs = (PatchPlace(), PatchShown())
    first = (vit_after(0), Select(Budget(tokens=keep), even_stride()))
    with torch.no_grad(), attach(model, (first, (VIT_OUT, Select(Budget(tokens=5), Selector(choose, needs))))):
        model(inputs)
    tokens, place, picture = seen[0]
    raster = tokens.row * 6 + tokens.col
    assert place.shape == (3, keep)
    torch.testing.assert_close(place, raster / 35)
    torch.testing.assert_close(picture[1], shown.flatten()[raster[1]].double())
    assert bool((picture[[0, 2]] == 1).all())


def test_places_are_of_the_patches_that_the_encoder_sees_in_a_view(make_model):
    """Of a tile all of them, whatever the picture's padding; of a picture with a grid of its own those of its grid."""
    model, real = make_model(class_token=True), torch.ones(2, 36, dtype=torch.bool)
    real[1, 6:] = False
    program = pruner("hired", Budget(tokens=3), Debias(1.0), early=0).program(model.facts)
    engine = VisionEngine(model.vision, program, 4, "auto")
    for columns, last in ((None, 35), (torch.tensor([[6], [3]]), 5)):
        engine.begin(lambda: torch.tensor([1, 2]), torch.tensor([0, 1]), real, columns)
        assert engine.now is not None
        place = engine.now.signals[PatchPlace()]
        torch.testing.assert_close(place[0], PLACE / 35)
        torch.testing.assert_close(place[1, : last + 1], torch.arange(last + 1) / last)
    with pytest.raises(ModelError, match="this model does not tell PatchShown"):
        padded = pruner("hired", Budget(tokens=3), Debias(1.0, 0.5), early=0).program(model.facts)
        VisionEngine(model.vision, padded, 4, "auto").begin(lambda: torch.tensor([1]), torch.tensor([0]))


def test_where_no_patch_shows_enough_none_is_padding(clear, batch, by_eye):
    model, inputs = clear(), batch("tt#tt")
    pad(model, inputs.images, 0, 22, 22)  # four rows of pixels, half of them in either of two rows of patches
    kept = []
    for padding in (None, 0.5, 0.2):
        debias = Debias(0.0, padding)
        with torch.no_grad(), attach(model, pruner("hired", Budget(tokens=8), debias).program(model.facts)):
            kept.append(by_eye.places(model(inputs).layout, 0))
    assert kept[0] == kept[1] != kept[2]
    assert {place // 6 for place in kept[2]} <= {2, 3}


def test_a_program_without_such_a_score_has_no_such_option():
    """An option of the encoder's rankings by attention alone: the score of FlowCut, say, is none."""
    folder = Path(vlm.__file__).parent / "models" / "pruners"
    found = set()
    for path in folder.glob("*.py"):
        module = importlib.import_module(f"vlm.models.pruners.{path.stem}")
        methods = [c for c in vars(module).values() if getattr(c, "__module__", "") == module.__name__]
        options = {field.name for c in methods if hasattr(c, "source") for field in fields(c)}
        if "attention" in options and options & {"debias", "debias_encoder"}:
            found.add(path.stem)
    assert found == {name.split(",")[0] for name in PLAIN}


def test_places_that_show_nothing_are_refused_at_once(clear):
    model = clear()
    facts = model.facts._replace(refuses={"PatchShown": "its pictures are padded elsewhere"})
    program = pruner("hired", Budget(tokens=8), Debias(1.0, 0.5)).program(facts)
    with pytest.raises(ModelError, match=r"^vit\.out: its pictures are padded elsewhere$"):
        check(program, facts)
    check(pruner("hired", Budget(tokens=8), Debias(1.0)).program(facts), facts)
    assert Ranking.of(PatchAttention(3), None).needs == (PatchAttention(3),)
