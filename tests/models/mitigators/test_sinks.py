"""The search for sink dimensions, on massive dimensions that are planted."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlm.models.errors import ModelError
from vlm.models.mitigators.var import Var
from vlm.models.program.artifact import Calibration, Shelf, fingerprint, write
from vlm.models.program.sinks import sink_dimensions
from vlm.models.program.tune import Asked

FIRST = 7  # the token with which every text begins


def planted(make_model: Any, batch: Any, dims: dict[int, float]) -> tuple[Any, Any]:
    """A model whose first token is large in some dimensions, and prompts that begin with it, one of them padded."""
    model = make_model()
    with torch.no_grad():
        for dim, value in dims.items():
            model.decoder.embed_tokens.weight[FIRST, dim] = value
    asked = []
    for rows in (("tt#t", "t#tttt"), ("t#tt",)):
        inputs = batch(*rows)
        inputs.tokens[:, 0] = FIRST
        asked.append(Asked(inputs, torch.zeros(len(rows), dtype=torch.long)))
    return model, SimpleNamespace(asked=asked)


def test_planted_dimensions_are_found_and_used(make_model, batch, tmp_path):
    model, material = planted(make_model, batch, {5: 900.0, 21: -800.0, 30: 100.0})
    path = tmp_path / "var.safetensors"
    method = Var(tau=3.0, calibration=Calibration(str(path)))
    found = method.calibrate(model, material, lambda *at: None)
    assert found.tensors["dims"].tolist() == [5, 21]
    write(path, found.tensors, {"method": "var", "weights": fingerprint(model)})
    model.shelf = Shelf(lambda *_: path, lambda: fingerprint(model))
    ((_, op),) = method.program(model.facts)
    ((_, expected),) = Var(tau=3.0, dims=(5, 21)).program(model.facts)
    assert op.needs == expected.needs


def test_no_sink_dimension_and_two_answers_to_one_question(make_model, batch):
    model, material = planted(make_model, batch, {})
    with pytest.raises(ModelError, match=r"^var.tau: no dimension of the first token's state is above 5.6 in"):
        Var(tau=5.6).calibrate(model, material, lambda *at: None)
    with pytest.raises(ModelError, match=r"finds the sink dimensions, and dims gives them; use one of the two"):
        Var(dims=(1,), calibration=Calibration()).program(model.facts)


def test_the_rule():
    """Of 100 prompts: dimension 3 is large in all, 8 in 95 (and most of all), 11 in 94, 14 in all but less."""
    x = torch.full((100, 400), 0.1)
    for dim, value, count in ((3, 10.0, 100), (8, 12.0, 95), (11, 14.0, 94), (14, 9.0, 100)):
        x[:count, dim] = value
    normed = x / x.square().mean(1, keepdim=True).sqrt()
    tau = float(normed[:, 14].min()) * 0.99
    assert sink_dimensions(x, tau) == ((3, 8), pytest.approx(float(normed[:95, 8].min()), rel=1e-4))
    assert sink_dimensions(x, tau, most=9)[0] == (3, 8, 14)
    assert sink_dimensions(x, 1e9)[0] == ()
