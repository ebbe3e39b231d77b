"""Calibration by trying, and the artifacts that keep what it found."""

from types import SimpleNamespace

import pytest
import torch

from vlm.models.errors import ModelError
from vlm.models.mitigators.act import Act
from vlm.models.mitigators.zerotuning import Zerotuning
from vlm.models.program.artifact import Calibration, Shelf, fingerprint, write
from vlm.models.program.attach import attach
from vlm.models.program.tune import Asked, answer_score, best_by_head


def make(batch):
    g = torch.Generator().manual_seed(3)
    inputs = batch("tt#ttt", "#tt", "t#t")
    return [Asked(inputs, torch.randint(0, 40, (3,), generator=g))]


def test_the_best_value_of_each_head_is_found(make_model, batch):
    model, method = make_model(), Zerotuning()
    asked = make(batch)

    def program_at(layer, head, gamma):
        gammas = torch.ones(4, 4)
        gammas[layer, head] = gamma
        return method.tuned(gammas, range(4))

    found = best_by_head(model, asked, program_at, [1, 2], (0.2, 3.0), 1.0, "entropy")
    bare = answer_score(model, asked, (), "entropy")
    logits = model.prefill(asked[0].inputs)[0]
    assert bare == pytest.approx(-float(torch.distributions.Categorical(logits=logits).entropy().mean()))
    for layer in range(4):
        for head in range(4):
            tried = {1.0: bare} | {
                g: answer_score(model, asked, program_at(layer, head, g), "entropy") for g in (0.2, 3.0)
            }
            expected = max(tried, key=lambda g, tried=tried: tried[g]) if layer in (1, 2) else 1.0
            assert float(found[layer, head]) == pytest.approx(expected)
    assert len(found.unique()) > 1


def test_an_artifact_of_another_model_or_method_is_refused(make_model, tmp_path):
    model = make_model()
    model.shelf = Shelf(lambda who, settings: tmp_path / "auto", lambda: fingerprint(model))
    method = Zerotuning(calibration=Calibration(str(tmp_path / "a.safetensors")))
    gamma = {"gamma": torch.full((4, 4), 2.0)}
    with pytest.raises(ModelError, match="found no file"):
        method.program(model.facts)
    write(tmp_path / "a.safetensors", gamma, {"method": "zerotuning", "weights": fingerprint(model)})
    assert len(method.program(model.facts)) == 4
    with torch.no_grad():
        model.language.lm_head.weight[0, 0] += 1
    with pytest.raises(ModelError, match="expected numbers for this model's weights"):
        method.program(model.facts)
    write(tmp_path / "a.safetensors", gamma, {"method": "act", "weights": fingerprint(model)})
    with pytest.raises(ModelError, match=r"expected a file of zerotuning; a\.safetensors is of act"):
        method.program(model.facts)
    write(
        tmp_path / "a.safetensors", {"gamma": torch.ones(3, 4)}, {"method": "zerotuning", "weights": fingerprint(model)}
    )
    with pytest.raises(ModelError, match=r"expected gamma of shape \(4, None\)"):
        method.program(model.facts)
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="is no safetensors file"):
        method.program(model.facts)


@torch.no_grad()
def test_act_finds_the_head_whose_sinks_hurt(make_model, batch):
    """Answers are what one head alone, with its sinks calibrated, would say, and neither the model nor another head."""
    model, method = make_model(), Act(beta=0.0, threshold=0.6, scaled=True, layers=(1, 3))
    layers = method.span(model.facts)
    rows = [batch(row) for row in ("tt#ttt", "#ttt", "t#tttttt", "ttt#tt", "tttt#", "#tttttttt", "t#t", "tt#tt")]

    def said(inputs, layer, head):
        heads = torch.zeros(4, 4, dtype=torch.bool)
        heads[layer, head] = True
        with attach(model, method.calibrated(heads, layers)):
            return int(model.prefill(inputs)[0].argmax())

    places = [(layer, head) for layer in layers for head in range(4)]
    by_row = [
        ({place: said(inputs, *place) for place in places}, int(model.prefill(inputs)[0].argmax())) for inputs in rows
    ]
    planted: dict[tuple[int, int], list[Asked]] = {}
    for inputs, (found, bare) in zip(rows, by_row, strict=True):
        for place, token in found.items():
            if token != bare and list(found.values()).count(token) == 1:
                planted.setdefault(place, []).append(Asked(inputs, torch.tensor([token])))
    assert planted
    for place, asked in planted.items():
        tensors, _ = method.calibrate(model, SimpleNamespace(asked=asked), lambda *at: None)
        assert tensors["heads"].nonzero().tolist() == [list(place)]
