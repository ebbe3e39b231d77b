"""VTI against blocks and layers written out, and directions that are planted in what they are found in."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlm.models.errors import ModelError
from vlm.models.mitigators.vti import Vti
from vlm.models.program.artifact import Calibration, Shelf, fingerprint, write
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate
from vlm.models.program.steer import block_states, masking_change, principal, text_change
from vlm.models.program.tune import Described
from vlm.models.pruners.tome import Tome

ENCODER: dict[str, Any] = {"class_token": True, "blocks": 4}


@pytest.fixture
def model(make_model) -> Any:
    found = make_model(**ENCODER)
    found.tokenize = lambda text: [ord(word[0]) % 40 for word in text.split()]
    found.shelf = Shelf(lambda who, settings: None, lambda: fingerprint(found))
    return found


def turn(x: torch.Tensor, v: torch.Tensor, by: float) -> torch.Tensor:
    """The formula, a vector at a time."""
    rows = []
    for row, direction in zip(x.reshape(-1, x.shape[-1]), v.expand(x.shape).reshape(-1, x.shape[-1]), strict=True):
        y = row / row.norm() + by * direction / direction.norm()
        rows.append(row.norm() * y / y.norm())
    return torch.stack(rows).view(x.shape)


def encode(model: Any, pixels: torch.Tensor, edit: Any = lambda block, x: x) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Features of one picture and what leaves each block, the blocks written out."""
    vit = model.vision.model
    x = vit._pos_embed(vit.patch_embed(pixels[None]))
    left = []
    for number, block in enumerate(vit.blocks):
        x = x + block.attn(block.norm1(x))
        x = x + edit(number, block.mlp(block.norm2(x)))
        left.append(x[0])
    return vit.norm(x), left


@pytest.fixture
def artifact(model, tmp_path) -> Any:
    g = torch.Generator().manual_seed(5)
    tensors = {"image": torch.randn(4, 37, 16, generator=g), "text": torch.randn(4, 32, generator=g)}
    path = write(tmp_path / "vti.safetensors", tensors, {"method": "vti", "weights": fingerprint(model)})
    return Calibration(str(path)), tensors


@torch.no_grad()
def test_both_sides_are_turned_as_the_formula_says(model, artifact, batch, dense, spliced):
    calibration, v = artifact
    inputs = batch("tt#ttt")
    method = Vti(alpha_image=0.7, alpha_text=1.3, calibration=calibration)
    with attach(model, method.program(model.facts)):
        got = model.prefill(inputs)[0][0]
    features, _ = encode(model, inputs.images[0], lambda n, x: turn(x, v["image"][n].double(), 0.07))
    x, image, _ = spliced(model, inputs, 0)
    x[image >= 0] = model.connector(features[:, 1:], model.vision.grid)[0]
    expected = dense(model, x, mlp=lambda n, out: turn(out, v["text"][n].double(), 0.13))[-1]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert not torch.allclose(got, model.prefill(inputs)[0][0], atol=1e-3)


@torch.no_grad()
def test_a_batch_equals_single_samples_and_text_alone_is_left(model, artifact, batch, alone):
    method = Vti(calibration=artifact[0])
    inputs = batch("tt#ttt", "#t#tttt", "ttt", side="left")
    options: Any = {"max_new_tokens": 5, "stop": 11}
    plain = generate(model, alone(inputs, 2), **options)
    with attach(model, method.program(model.facts)):
        answers = generate(model, inputs, **options)
        assert answers == [generate(model, alone(inputs, b), **options)[0] for b in range(3)]
    assert answers[2] == plain[0]


@torch.no_grad()
def test_what_maskings_change(model, batch):
    inputs = batch("t#t", "#tt#")
    got = masking_change(model, inputs, 0.9, 3)
    pictures: list[list[torch.Tensor]] = [[], [], []]
    real, model._enter = model._enter, lambda given, side: (_keep(pictures, given), real(given, side))[1]
    masking_change(model, inputs, 0.9, 3)
    del model._enter
    for number, (clean, *blank) in enumerate(pictures):
        for picture in blank:
            cells = picture.unflatten(1, (6, 8)).unflatten(3, (6, 8)).abs().sum((0, 2, 4)) > 0
            assert int(cells.sum()) == 36 - round(0.9 * 36)
            assert torch.equal(picture[picture != 0], clean[picture != 0])
        assert not torch.equal(blank[0], blank[1])
        left = [torch.stack(encode(model, picture)[1]) for picture in (clean, *blank)]
        torch.testing.assert_close(got[number], sum(left[1:]) / 3 - left[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(block_states(model, inputs)[0], torch.stack(encode(model, inputs.images[0])[1]))


def _keep(pictures: list[list[torch.Tensor]], inputs: Any) -> None:
    for number, picture in enumerate(inputs.images):
        pictures[number].append(picture)


@torch.no_grad()
def test_what_a_made_up_caption_changes(model, batch, alone, dense, spliced):
    inputs = batch("t#t", "#tttt")  # the first row is padded
    right, wrong = ["a b", "c"], ["a x y", "d"]
    got = text_change(model, inputs, right, wrong)
    for b in range(2):
        states: list[dict[int, torch.Tensor]] = []
        for text in (right[b], wrong[b]):
            row = alone(inputs, b)
            tokens = torch.tensor([[*row.tokens[0].tolist(), *model.tokenize(text)]])
            found: dict[int, torch.Tensor] = {}
            x, *_ = spliced(model, row._replace(tokens=tokens, valid=tokens > -2), 0)
            dense(model, x, leave=lambda n, x, found=found: found.update({n: x[-1]}))
            states.append(found)
        expected = torch.stack([states[0][n] - states[1][n] for n in range(4)])
        torch.testing.assert_close(got[b], expected, rtol=0, atol=1e-9)


def test_the_principal_change():
    g = torch.Generator().manual_seed(0)
    mean, planted = torch.randn(2, 7, generator=g).double(), torch.randn(2, 7, generator=g).double()
    planted /= planted.norm(dim=1, keepdim=True)
    amount = torch.randn(20, 1, 1, generator=g).double() * 3
    changes = mean + amount * planted + 1e-4 * torch.randn(20, 2, 7, generator=g)
    side = (changes.mean(0) * planted).sum(1, keepdim=True).sign()
    torch.testing.assert_close(principal(changes), changes.mean(0) + side * planted, rtol=0, atol=1e-3)
    torch.testing.assert_close(principal(changes[:1]), changes[0])
    centred = changes - changes.mean(0)
    for place in range(2):
        first = torch.linalg.svd(centred[:, place], full_matrices=False).Vh[0]
        alike = (principal(changes)[place] - changes.mean(0)[place]) @ first
        assert float(alike.abs()) == pytest.approx(1)


def test_from_calibration_to_the_program(model, batch, tmp_path):
    method = Vti(masks=2, mask_ratio=0.5, calibration=Calibration(str(tmp_path / "a")))
    inputs = batch("t#t", "#tttt")
    material: Any = SimpleNamespace(described=[Described(inputs, ["a b", "c"], ["", "d"])])
    told: list[tuple[int, int]] = []
    found = method.calibrate(model, material, lambda *at: told.append(at))
    assert told == [(1, 1)] and found.tensors["image"].shape == (4, 37, 16)
    only = text_change(model, inputs, ["a b", "c"], ["", "d"])[1:]
    torch.testing.assert_close(found.tensors["text"], only[0])  # the first has no made-up caption
    changed = masking_change(model, inputs, 0.5, 2)
    torch.testing.assert_close(found.tensors["image"][2], principal(changed[:, 2]))
    write(tmp_path / "a", found.tensors, {"method": "vti", "weights": fingerprint(model)})
    assert len(method.program(model.facts)) == 8
    assert next(str(site) for site, _ in Vti(0.0, calibration=method.calibration).program(model.facts)) == "resid[0]"
    unknown: Any = SimpleNamespace(described=[Described(inputs, ["a", "c"], ["", ""])])
    with pytest.raises(ModelError, match=r"vti.alpha_text: expected captions whose objects are known"):
        method.calibrate(model, unknown, lambda *at: None)


def test_neutral_and_refused(model, artifact, batch):
    calibration = artifact[0]
    assert Vti(0.0, 0.0).program(model.facts) == ()
    with pytest.raises(ModelError, match=r"vti.mask_ratio: expected more than 0 and at most 1; found 1.5"):
        Vti(mask_ratio=1.5).program(model.facts)
    hidden = model.facts._replace(vision=None)
    with pytest.raises(ModelError, match=r"^vti.alpha_image: "):
        Vti(calibration=calibration).program(hidden)
    assert len(Vti(0.0, calibration=calibration).program(hidden)) == 4
    program = Vti(calibration=calibration).program(model.facts)
    cut = Tome(Budget.parse("50%")).program(model.facts)
    with pytest.raises(ModelError, match=r"vit.resid: its edits are of every token"), attach(model, program + cut):
        pass
    inputs = batch("t#tt")
    with attach(model, program), pytest.raises(ModelError, match="which training does not have"):
        model(inputs, torch.ones_like(inputs.tokens).double())
