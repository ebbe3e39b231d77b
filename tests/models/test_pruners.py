"""What every pruner promises. The folder is listed, so a new pruner is held to it by being there."""

import importlib
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm
from vlm.models.mitigators.m3id import M3id
from vlm.models.mitigators.var import Var
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.program.decode import generate
from vlm.models.program.layout import Layout
from vlm.models.program.program import Select, in_encoder

NAMES = sorted(path.stem for path in (Path(vlm.__file__).parent / "models" / "pruners").glob("*.py"))
CLASS_TOKEN: dict[str, Any] = {"class_token": True, "blocks": 4}  # what several pruners rank patches by
# VTW leaves no visual token at the end, so its budget is an average over layers and what is left is none.
NOTHING_LEFT = {"vtw": Budget.parse({"average": "25%"})}
ROWS = ("tt#ttt", "t#t#tt", "tttt", "#tttttttt")  # one image, two images, none, and much text after


def pruner(name: str) -> Any:
    module = importlib.import_module(f"vlm.models.pruners.{name}")
    found = [c for c in vars(module).values() if is_dataclass(c) and c.__module__ == module.__name__]
    assert [c.__name__.lower() for c in found if isinstance(c, type)] == [name.replace("_", "")]
    return found[0]


def debiased() -> list[tuple[str, dict[str, Any]]]:
    """Every pruner as it is, and those that rank by attention with the bias taken out of it."""
    found: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in NAMES]
    for name in NAMES:
        options = {field.name for field in fields(pruner(name))} & {"debias", "debias_encoder"}
        found += [(name, dict.fromkeys(options, Debias(1.5, 0.5)))] if options else []
    return found


def budget(name: str, keep: str | int = "25%") -> Budget:
    return NOTHING_LEFT.get(name, Budget.parse(keep))


def images_kept(layout: Layout, b: int, first: int = 0) -> list[tuple[int, int, int]]:
    """(image, counted from ``first``, grid row, grid column) of every visual token of a row, in order."""
    seen = layout.visual[b]
    image = layout.image[b, seen] - first
    return list(zip(image.tolist(), layout.row[b, seen].tolist(), layout.col[b, seen].tolist(), strict=True))


def test_the_folder_was_found():
    assert {"divprune", "fastv", "random", "stride"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", ["25%", 5])
def test_keeps_exactly_the_budget_in_order_and_all_text(make_model, batch, name, keep):
    model, inputs = make_model(**CLASS_TOKEN), batch(*ROWS)
    method = pruner(name)(keep=budget(name, keep))
    with attach(model, method.program(model.facts)):
        layout = model(inputs).layout
    each = 0 if name in NOTHING_LEFT else 9 if keep == "25%" else 5
    for b, row in enumerate(ROWS):
        images = row.count("#")
        kept = images_kept(layout, b)
        assert len(kept) == images * each
        assert kept == sorted(set(kept))
        assert all(0 <= r < 6 and 0 <= c < 6 for _, r, c in kept)
        text = layout.source[b, layout.valid[b] & ~layout.visual[b]].tolist()
        assert text == [t for t, mark in enumerate(row) if mark == "t"]


@pytest.mark.parametrize(("name", "options"), debiased())
def test_a_sample_is_cut_the_same_alone_and_in_a_batch(make_model, batch, alone, name, options):
    model, inputs = make_model(**CLASS_TOKEN), batch(*ROWS)
    grey = torch.tensor(model.vision.image.mean).double()
    inputs.images[1, :, :20] = ((grey * 255).round() / 255 - grey)[:, None, None] * 2  # padding above a picture
    method = pruner(name)(keep=budget(name), **options)
    with attach(model, method.program(model.facts)), torch.no_grad():
        together, (logits, stream) = model(inputs), model.prefill(inputs)
        steps = [model.step(stream, torch.full((4,), token)) for token in (3, 5)]
        for b in range(4):
            single, (own, own_stream) = model(alone(inputs, b)), model.prefill(alone(inputs, b))
            first = "".join(ROWS[:b]).count("#")
            assert images_kept(together.layout, b, first) == images_kept(single.layout, 0)
            hidden = together.hidden[b][together.layout.valid[b]]
            torch.testing.assert_close(hidden, single.hidden[0], rtol=0, atol=1e-9)
            torch.testing.assert_close(logits[b], own[0], rtol=0, atol=1e-9)
            for token, step in zip((3, 5), steps, strict=True):
                own = model.step(own_stream, torch.tensor([token]))
                torch.testing.assert_close(step[b], own[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_training_and_generation_make_the_same_choice(make_model, batch, name):
    model, inputs = make_model(**CLASS_TOKEN), batch("t#tttt", "#t#ttt")
    method = pruner(name)(keep=budget(name))
    with attach(model, method.program(model.facts)):
        trained, (_, stream) = model.train()(inputs), model.eval().prefill(inputs)
        for b in range(2):
            assert images_kept(trained.layout, b) == images_kept(stream.run.last, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("position", ["keep", "reindex"])
def test_position_ids(make_model, batch, name, position):
    model, inputs = make_model(**CLASS_TOKEN), batch(*ROWS)
    method = pruner(name)(keep=budget(name), position=position)
    with attach(model, method.program(model.facts)), torch.no_grad():
        before = model(inputs._replace(images=inputs.images[:0], owner=inputs.owner[:0], tokens=inputs.tokens.abs()))
        cut = model(inputs).layout
        _, stream = model.prefill(inputs)
        model.step(stream, torch.tensor([1, 2, 3, 4]))
        grown = stream.run.last
    assert before.layout.position.max() == 8  # without images nothing is cut
    for b, row in enumerate(ROWS):
        whole = []  # (text source or image place) of every token before the cut, in order
        for source, mark in enumerate(row):
            whole += [(source, -1)] if mark == "t" else [(source, place) for place in range(36)]
        valid = cut.valid[b]
        place = torch.where(cut.visual[b], cut.row[b] * 6 + cut.col[b], -1)[valid].tolist()
        kept = list(zip(cut.source[b, valid].tolist(), place, strict=True))
        expected = [whole.index(token) for token in kept] if position == "keep" else list(range(len(kept)))
        assert cut.position[b, valid].tolist() == expected
        assert grown.position[b, -1] == expected[-1] + 1
        assert grown.position[b][grown.valid[b]].tolist() == [*expected, expected[-1] + 1]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_kept_features(make_model, batch, name):
    model, inputs = make_model(**CLASS_TOKEN).train(), batch(*ROWS)
    method = pruner(name)(keep=budget(name))
    program = method.program(model.facts)
    features: list[torch.Tensor] = []

    def keep_gradient(module: Any, args: Any, found: Any) -> None:
        if found.tokens.requires_grad:  # a guide looks first, without
            found.tokens.retain_grad()
            features.append(found.tokens)

    handle = model.vision.register_forward_hook(keep_gradient)
    with attach(model, program):
        out = model(inputs, (inputs.tokens >= 0).double() * inputs.valid)
        out.loss.backward()
    handle.remove()
    assert features[0].grad is not None
    touched = features[0].grad.abs().sum(2) > 0  # [images, tokens]
    assert all(p.grad is not None for p in model.parameters())
    if any(in_encoder(site) for site, _ in program):
        assert touched.all()  # what was dropped never came out of the encoder
        return
    kept = torch.zeros_like(touched)
    shown = out.layout.visual
    kept[out.layout.image[shown], out.layout.row[shown] * 6 + out.layout.col[shown]] = True
    assert touched[kept].all()
    # a cut inside the language model comes after layers that saw every token; merged tokens go on in others
    if all(site.name != "llm.before" and op.selector.reduce is None for site, op in program):
        assert not touched[~kept].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mitigator", [Var(tau=2.6, taken=0.9, image_min=0.0, rho=0.0), M3id(decay=1.0, tau=1.1)])
def test_composes_with_a_mitigator(make_model, batch, alone, name, mitigator):
    model, inputs = make_model(**CLASS_TOKEN), batch(*ROWS)
    cut = pruner(name)(keep=budget(name)).program(model.facts)
    both = cut + mitigator.program(model.facts)
    with attach(model, cut):
        plain = generate(model, inputs, max_new_tokens=8, stop=99)
        bare = model(inputs)
    with attach(model, both):
        answers = generate(model, inputs, max_new_tokens=8, stop=99)
        out = model(inputs)
        singles = [generate(model, alone(inputs, b), max_new_tokens=8, stop=99)[0] for b in range(4)]
    assert answers == singles
    if not (name in NOTHING_LEFT and isinstance(mitigator, Var)):  # which needs visual tokens in layer 2
        assert answers != plain or not torch.equal(out.hidden, bare.hidden)  # the mitigator did act
    assert answers[2] == plain[2]  # but not on the row without an image
    if all(site.layer <= 2 for site, _ in cut):  # later cuts see what the mitigator changed from layer 2 on
        assert [images_kept(out.layout, b) for b in range(4)] == [images_kept(bare.layout, b) for b in range(4)]


@pytest.mark.parametrize("name", NAMES)
def test_the_program_is_cuts_and_a_full_budget_none(make_model, name):
    facts = make_model(**CLASS_TOKEN).facts
    program = pruner(name)(keep=budget(name)).program(facts)
    assert program and all(isinstance(op, Select) for _, op in program)
    assert pruner(name)(keep=Budget.parse("100%")).program(facts) == ()


@pytest.mark.parametrize("name", ["fastv", "divprune", "random"])
def test_a_larger_budget_keeps_a_superset(make_model, batch, name):
    # true of rankings (and of greedy orders), whatever the score
    model, inputs = make_model(**CLASS_TOKEN), batch("tt#ttt", "t#t#tt")
    kept: list[list[set]] = []
    for tokens in (2, 5, 9, 20):
        with attach(model, pruner(name)(keep=Budget.parse(tokens)).program(model.facts)):
            layout = model(inputs).layout
        kept.append([set(images_kept(layout, b)) for b in range(2)])
    for smaller, larger in pairwise(kept):
        assert all(a < b for a, b in zip(smaller, larger, strict=True))
