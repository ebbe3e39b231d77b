"""Images in tiles: the table against Transformers' LLaVA-NeXT and a loop, the model against each view on its own."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llava_next.modeling_llava_next import unpad_image

from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.backbones.multilane import Multilane
from vlm.models.connectors.mlp import Mlp
from vlm.models.connectors.resampler import Resampler
from vlm.models.errors import ModelError
from vlm.models.language import build_language
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate
from vlm.models.program.program import LLM_IN, VIT_OUT, Select
from vlm.models.program.select import even_stride, max_min_diversity
from vlm.models.splice import IMAGE_TOKEN
from vlm.models.tiles import tile_table
from vlm.models.vision_language import Inputs, VisionLanguageModel

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.25,
}
# rows, columns, height and width: a wide picture (padding above and below), a small one, a tall one in three tiles
TILES = torch.tensor([[1, 2, 30, 90], [0, 0, 40, 40], [3, 1, 144, 20]])


def build(connector: Any = None, **options: Any) -> VisionLanguageModel:
    torch.manual_seed(0)
    vision = ConvVit(48, dim=16, depth=2, heads=2)
    connector = connector or Mlp(16, 32)
    return VisionLanguageModel(vision, connector, build_language(LLAMA, 40), **{"max_tiles": 4, **options}).double()


def tiled(tiles: torch.Tensor = TILES, rows: tuple[str, ...] = ("t#t", "tt##tt")) -> Inputs:
    """Rows of text (t) and images (#) with noise for every view; padded on the right."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 40, (len(rows), max(map(len, rows))), generator=g)
    valid = torch.zeros_like(tokens, dtype=torch.bool)
    owner = []
    for b, row in enumerate(rows):
        valid[b, : len(row)] = True
        for t, mark in enumerate(row):
            if mark == "#":
                tokens[b, t] = IMAGE_TOKEN
                owner.append(b)
    views = int((1 + tiles[:, 0] * tiles[:, 1]).sum())
    images = torch.randn(views, 3, 48, 48, generator=g, dtype=torch.float64)
    return Inputs(tokens, valid, images, torch.tensor(owner), (), tiles)


def loop(tiles: list[int], grid: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """(row, column, view, place in it) of an image's tokens in their order; padding as Transformers removes it."""
    rows, cols, height, width = tiles
    tokens = [(r, c, 0, r * grid[1] + c) for r in range(grid[0]) for c in range(grid[1])]
    canvas = torch.arange(rows * grid[0] * cols * grid[1]).view(1, rows * grid[0], cols * grid[1])
    kept = unpad_image(canvas, (height, width)).flatten().tolist() if rows else []
    for place in kept:
        r, c = divmod(place, cols * grid[1])
        view = 1 + r // grid[0] * cols + c // grid[1]
        tokens.append((grid[0] + r, c, view, r % grid[0] * grid[1] + c % grid[1]))
    return tokens


sides = st.integers(300, 800)  # of thinner pictures Transformers may keep nothing
shapes = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), sides, sides), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(shapes, st.sampled_from([(3, 3), (4, 4), (6, 6)]))
def test_the_table_is_a_loop_over_images(shapes: list[tuple[int, int, int, int]], grid: tuple[int, int]):
    tiles = torch.tensor([(r, c if r else 0, h, w) for r, c, h, w in shapes])
    views = (1 + tiles[:, 0] * tiles[:, 1]).tolist()
    table = tile_table(tiles, grid, True, sum(views))
    assert table.image.tolist() == [n for n, count in enumerate(views) for _ in range(count)]
    for n, shape in enumerate(tiles.tolist()):
        expected = loop(shape, grid)
        assert int(table.size[n]) == len(expected)
        first = sum(views[:n])
        seen = {(v, p) for v in range(views[n]) for p in table.real[first + v].nonzero().flatten().tolist()}
        assert seen == {(view, place) for _, _, view, place in expected}
        for number, (row, col, view, place) in enumerate(expected):
            at = (first + view, place)
            assert (int(table.row[at]), int(table.col[at]), int(table.number[at])) == (row, col, number)


def test_a_thin_picture_keeps_a_token():
    table = tile_table(torch.tensor([[2, 1, 1, 500]]), (3, 3), True, 3)
    assert table.real[1:].any()


def embedded(model: Any, inputs: Inputs, b: int, grid: tuple[int, int] = (6, 6)) -> tuple[torch.Tensor, list[tuple]]:
    """Row b's embeddings, and (image, row, column) of every token, by encoding one view after the other."""
    assert inputs.tiles is not None
    pieces, places = [], []
    image = view = 0
    for row in range(len(inputs.tokens)):
        for token in inputs.tokens[row][inputs.valid[row]].tolist():
            if token != IMAGE_TOKEN:
                if row == b:
                    pieces.append(model.language.get_input_embeddings()(torch.tensor(token)))
                    places.append((-1, -1, -1))
                continue
            shape = inputs.tiles[image].tolist()
            count = 1 + shape[0] * shape[1]
            if row == b:
                found = [model.vision(inputs.images[v : v + 1]) for v in range(view, view + count)]
                projected = [model.connector(one.tokens, one.grid)[0] for one in found]
                for r, c, v, place in loop(shape, grid):
                    pieces.append(projected[v][place])
                    places.append((image, r, c))
            image, view = image + 1, view + count
    return torch.stack(pieces), places


@pytest.mark.parametrize("shuffle", [1, 2])
def test_the_model_is_its_views_one_by_one(shuffle):
    model, inputs = build(Mlp(16, 32, shuffle=shuffle)).eval(), tiled()
    out = model(inputs)
    for b in range(2):
        x, places = embedded(model, inputs, b, model.visual_grid)
        real = out.layout.valid[b]
        shown = zip(
            *(field[b, real].tolist() for field in (out.layout.image, out.layout.row, out.layout.col)), strict=True
        )
        assert list(shown) == places
        assert out.layout.position[b, real].tolist() == list(range(len(places)))
        stock = model.language(inputs_embeds=x[None]).logits[0]
        torch.testing.assert_close(model.logits(out.hidden[b, real]), stock, rtol=0, atol=1e-9)
    visual = [int((out.layout.image == n).sum()) for n in range(3)]
    assert model.visual_counts(inputs).tolist() == [visual[0], visual[1] + visual[2]]
    assert visual[1] == 36 // shuffle**2 and visual[0] <= 3 * visual[1] and visual[2] < 4 * visual[1]


def test_generation_is_that_of_the_views_one_by_one():
    model, inputs = build().eval(), tiled()
    answers = generate(model, inputs, max_new_tokens=4, stop=99)
    with torch.no_grad():
        for b in range(2):
            x, _ = embedded(model, inputs, b)
            for token in answers[b]:
                assert int(model.language(inputs_embeds=x[None]).logits[0, -1].argmax()) == token
                x = torch.cat([x, model.language.get_input_embeddings()(torch.tensor([token]))])


def test_images_that_need_no_tiles_are_the_same_without_them():
    model = build().eval()
    with_table = tiled(torch.tensor([[0, 0, 9, 9]] * 3))
    plain = with_table._replace(tiles=None)
    weights = (plain.tokens >= 0).double() * plain.valid
    found, expected = model(with_table, weights), model(plain, weights)
    assert torch.equal(found.hidden, expected.hidden) and torch.equal(found.loss, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(found.layout[:7], expected.layout[:7], strict=True))


def test_gradients_reach_everything_but_padding():
    model, inputs = build().train(), tiled()
    inputs.images.requires_grad_(True)
    model(inputs, (inputs.tokens >= 0).double() * inputs.valid).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert inputs.images.grad is not None and inputs.images.grad.flatten(1).any(1).all()


@pytest.mark.parametrize("site", [VIT_OUT, LLM_IN])
@pytest.mark.parametrize("keep", ["25%", 10])
def test_an_image_has_one_budget_for_all_its_views(site, keep):
    model, inputs = build().eval(), tiled()
    budget = Budget.parse(keep)
    with torch.no_grad():
        whole = model(inputs).layout
        with attach(model, ((site, Select(budget, max_min_diversity())),)):
            out = model(inputs)
    places = list(zip(*(field.flatten().tolist() for field in whole[1:5]), strict=True))  # image, row, col, position
    for n, size in enumerate([int((whole.image == n).sum()) for n in range(3)]):
        mine = out.layout.image == n
        if site == VIT_OUT:
            assert int(mine.sum()) == budget.of(size)
        kept = list(zip(*(field[mine].tolist() for field in out.layout[1:5]), strict=True))
        assert set(kept) <= set(places) and kept == sorted(kept)  # none of padding; position ids as before the cut
    total = [budget.of(int((whole.image[b] >= 0).sum()), images) for b, images in enumerate((1, 2))]
    assert out.layout.visual.sum(1).tolist() == total or site == VIT_OUT


@pytest.mark.parametrize("site", [VIT_OUT, LLM_IN])
def test_a_full_budget_changes_nothing(site):
    model, inputs = build().eval(), tiled()
    with torch.no_grad(), attach(model, ((site, Select(Budget(tokens=1000), even_stride())),)):
        assert torch.equal(model(inputs).hidden, build().eval()(inputs).hidden)


def test_queries_of_a_resampler_stand_view_by_view():
    torch.manual_seed(0)
    model, inputs = build(Resampler(16, 32, queries=4, heads=2)).eval(), tiled()
    out = model(inputs)
    assert model.visual_counts(inputs).tolist() == [12, 20] and model.most_visual_tokens == 20
    first = out.layout.visual[0]
    assert out.layout.row[0, first].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert out.layout.col[0, first].tolist() == [0, 1] * 6
    with torch.no_grad():
        features = torch.cat([model.connector(model.vision(v[None]).tokens, (6, 6))[0] for v in inputs.images[:3]])
        text = model.language.get_input_embeddings()(inputs.tokens[0, [0, 2]])
        x = torch.cat([text[:1], features, text[1:]])
        stock = model.language(inputs_embeds=x[None]).logits[0]
        torch.testing.assert_close(model.logits(out.hidden[0, out.layout.valid[0]]), stock, rtol=0, atol=1e-9)


def test_summaries_of_an_encoder_are_never_padding():
    lanes = Multilane(ConvVit(48, dim=16, depth=1, heads=2, class_token=True), selectors=5)
    model = VisionLanguageModel(lanes, Mlp(16, 32), build_language(LLAMA, 40), max_tiles=4).double().eval()
    out = model(tiled())
    assert model.visual_counts(tiled()).tolist() == out.layout.visual.sum(1).tolist() == [15, 25]
    assert out.layout.row[0][out.layout.visual[0]].tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_text_only_and_images_removed():
    model, inputs = build().eval(), tiled()
    bare = inputs.without_images()
    assert bare.tiles is not None and len(bare.tiles) == 0 and model.visual_counts(bare).tolist() == [0, 0]
    out = model(bare)
    stock = model.language(inputs_embeds=model.language.get_input_embeddings()(bare.tokens[:1, :2])).logits[0]
    torch.testing.assert_close(model.logits(out.hidden[0][out.layout.valid[0]]), stock, rtol=0, atol=1e-9)


def test_what_the_model_tells():
    model = build()
    assert model.visual_tokens is None and model.facts.visual is None and model.most_visual_tokens == 5 * 36
    plain = build(max_tiles=0)
    assert plain.visual_tokens == plain.facts.visual == plain.most_visual_tokens == 36


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"max_tiles": 2}, {}, "images: expected at most 2 tiles of an image; found 3"),
        ({}, {"tiles": TILES[:1].expand(3, 4)}, "images: expected 9 views, the whole of each and its tiles; found 8"),
    ],
)
def test_a_batch_that_does_not_fit(options, change, message):
    with pytest.raises(ModelError, match=message):
        build(**options)(tiled()._replace(**change))
