"""What every connector promises (the folder is listed), and the resampler against its definition in fp64."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm
from vlm.models.connectors.linear import Linear
from vlm.models.connectors.mlp import Mlp
from vlm.models.connectors.resampler import Resampler, sines
from vlm.models.errors import ModelError

NAMES = sorted(path.stem for path in (Path(vlm.__file__).parent / "models" / "connectors").glob("*.py"))
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}, {"bias": False}],
    "mlp": [{}, {"shuffle": 2}],
    "resampler": [{"queries": 4, "heads": 2}, {"queries": 5, "heads": 2, "depth": 1, "positions": True}],
}


def connector(name: str, options: dict[str, Any]) -> Any:
    module = importlib.import_module(f"vlm.models.connectors.{name}")
    (found,) = [c for c in vars(module).values() if isinstance(c, type) and "source" in vars(c)]
    return found(vision_dim=6, language_dim=8, **options).double().eval()


CASES = [(name, options) for name in NAMES for options in VARIANTS.get(name, [{}])]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_tokens_are_those_of_the_grid_that_it_tells(name, options):
    made, x = connector(name, options), torch.randn(3, 24, 6, dtype=torch.float64)
    rows, cols = made.grid(4, 6)
    out = made(x, (4, 6))
    assert out.shape == (3, rows * cols, 8)
    for one in range(3):  # images have nothing to do with each other
        torch.testing.assert_close(made(x[one : one + 1], (4, 6))[0], out[one], rtol=0, atol=1e-12)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_token_wise_and_spatial_are_true(name, options):
    made, x = connector(name, options), torch.randn(1, 24, 6, dtype=torch.float64, requires_grad=True)
    rows, cols = made.grid(4, 6)
    sees = []  # input places that each output token depends on
    for token in made(x, (4, 6))[0].unbind():
        (gradient,) = torch.autograd.grad(token.square().sum(), x, retain_graph=True)
        sees.append(gradient[0].abs().sum(1).nonzero().flatten().tolist())
    assert made.token_wise == (sees == [[place] for place in range(24)])
    boxes = [
        [r * 6 + c for r in range(4) for c in range(6) if (r * rows // 4, c * cols // 6) == (i, j)]
        for i in range(rows)
        for j in range(cols)
    ]
    assert made.spatial == (sees == boxes)
    if made.token_wise:
        some = torch.tensor([3, 4, 17])
        assert torch.equal(made(x[:, some], (4, 6)), made(x, (4, 6))[:, some])


def test_linear_is_one_matrix():
    made, x = connector("linear", {}), torch.randn(2, 4, 6, dtype=torch.float64)
    assert isinstance(made, Linear) and torch.allclose(made(x, (2, 2)), x @ made.layer.weight.T + made.layer.bias)


def normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("positions", [False, True])
def test_the_resampler_by_hand(positions):
    made = connector("resampler", {"queries": 5, "heads": 2, "depth": 2, "positions": positions})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(6, 6, dtype=torch.float64)
    features, tokens = x @ made.project.weight.T + made.project.bias, made.queries
    for layer in made.layers:
        seen, own = normed(features, layer.norm_features), normed(tokens, layer.norm_queries)
        places = sines(2, 3, features) if positions else torch.zeros_like(features)
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            q = own @ layer.q.weight[h].T
            k = torch.cat([seen + places, own]) @ layer.k.weight[h].T
            v = torch.cat([seen, own]) @ layer.v.weight[h].T
            heads.append((q @ k.T / 2).softmax(1) @ v)
        tokens = tokens + torch.cat(heads, 1) @ layer.out.weight.T
        inner = normed(tokens, layer.mlp[0]) @ layer.mlp[1].weight.T
        tokens = tokens + torch.nn.functional.gelu(inner) @ layer.mlp[3].weight.T
    torch.testing.assert_close(made(x[None], (2, 3))[0], normed(tokens, made.norm), rtol=0, atol=1e-10)


def test_a_resampler_knows_places_only_if_told():
    x, order = torch.randn(1, 6, 6, dtype=torch.float64), torch.tensor([5, 2, 0, 1, 4, 3])
    blind, seeing = (connector("resampler", {"queries": 4, "heads": 2, "positions": p}) for p in (False, True))
    torch.testing.assert_close(blind(x[:, order], (2, 3)), blind(x, (2, 3)), rtol=0, atol=1e-12)
    assert not torch.allclose(seeing(x[:, order], (2, 3)), seeing(x, (2, 3)))
    assert not torch.allclose(seeing(x, (3, 2)), seeing(x, (2, 3)))


def test_sines_of_row_and_column():
    found = sines(3, 4, torch.zeros(8, dtype=torch.float64)).unflatten(0, (3, 4))
    for r in range(3):
        for c in range(4):
            for place, values in ((r, found[r, c, :4]), (c, found[r, c, 4:])):
                angle = torch.tensor([place, place / 100], dtype=torch.float64)
                torch.testing.assert_close(values, torch.cat([angle.sin(), angle.cos()]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("queries", "grid"), [(1, (1, 1)), (9, (3, 3)), (64, (8, 8)), (12, (1, 12))])
def test_queries_fill_a_square_or_a_row(queries, grid):
    assert Resampler(6, 8, queries=queries).grid(24, 7) == grid


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "must be above 0; found 0, 2, 8 and 4"),
        ({"heads": 3}, "expected a width that divides by 3 heads; found 8"),
        ({"heads": 2, "positions": True, "language_dim": 6}, "by 2 heads and, for positions, by 4; found 6"),
    ],
)
def test_what_a_resampler_cannot_be(options, message):
    with pytest.raises(ModelError, match=message):
        Resampler(**{"vision_dim": 6, "language_dim": 8, **options})


def test_only_the_fold_of_an_mlp_mixes_tokens():
    assert Mlp(6, 8).token_wise and not Mlp(6, 8, shuffle=2).token_wise
