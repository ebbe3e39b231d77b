"""Caches whose rows and heads hold different numbers of entries."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlm.models.program.attach import attach
from vlm.models.program.cache import Evict, Held, PackedLayer, Row, held_whole, pick, shorten, stored
from vlm.models.program.layout import Layout
from vlm.models.program.program import KV_PREFILL


def states(batch: int = 2, heads: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randn(batch, heads, length, 3)


def whole(batch: int, length: int) -> Held:
    place = torch.arange(length).expand(batch, length)
    return held_whole(Layout(torch.ones_like(place), place, place, place, place, place, place), 2)


def uneven(batch: int = 2, heads: int = 2, length: int = 7) -> torch.Tensor:
    """Marks whose counts differ from head to head; the last entry of each head is marked, none of the first row's."""
    marks = torch.rand(batch, heads, length) < 0.5
    marks[:, :, -1] = True
    marks[0, 0] = True
    return marks


def test_a_packed_layer_holds_what_a_padded_one_would():
    keys, values = states(), states()
    index, real = pick(uneven())
    padded = [x.gather(2, index[..., None].expand(-1, -1, -1, 3)) * real[..., None] for x in (keys, values)]
    layer = PackedLayer(padded[0], padded[1], real)
    assert layer.keys.shape == (int(real.sum()), 3)
    for step in range(3):
        new = states(length=1), states(length=1)
        padded = [torch.cat([old, one], 2) for old, one in zip(padded, new, strict=True)]
        for got, expected in zip(layer.update(*new), padded, strict=True):
            assert torch.equal(got, expected)
        assert layer.get_seq_length() == padded[0].shape[2]
        assert layer.get_mask_sizes(1) == (padded[0].shape[2] + 1, 0)
        assert layer.keys.shape == (int(real.sum()) + 4 * (step + 1), 3)
    order = torch.tensor([1, 1, 0])
    layer.reorder_cache(order)
    layer.crop(-2)
    for got, expected in zip(layer.padded(), padded, strict=True):
        assert torch.equal(got, expected[order][:, :, :-2])
    assert int(layer.real.sum()) == len(layer.keys)


@pytest.mark.parametrize("even", [True, False])
def test_a_shortened_cache_keeps_the_marked_entries_of_each_head(even):
    held, cache = whole(2, 7), DynamicCache()
    keys, values = states(), states()
    cache.update(keys, values, 0)
    marks = uneven()
    if even:
        marks = torch.arange(7).expand(2, 2, 7) % 3 == 0
    short = shorten(cache, 0, held, marks)
    assert isinstance(cache.layers[0], DynamicLayer if even else PackedLayer)
    now = stored(cache.layers[0])
    for b in range(2):
        for h in range(2):
            real = short.valid[b, h]
            assert short.place[b, h, real].tolist() == marks[b, h].nonzero().flatten().tolist()
            assert torch.equal(now[0][b, h, real], keys[b, h, marks[b, h]])
            assert torch.equal(now[1][b, h, real], values[b, h, marks[b, h]])
    everything = torch.ones_like(short.valid)
    assert shorten(cache, 0, short, everything) is short
    newest = (torch.arange(short.valid.shape[2]) == short.valid.shape[2] - 1).expand_as(short.valid)
    last = shorten(cache, 0, short, newest)  # even again
    assert isinstance(cache.layers[0], DynamicLayer)
    assert last.place.shape[2] == stored(cache.layers[0])[0].shape[2] == 1


def test_a_row_pays_nothing_to_what_it_did_not_read():
    query, key = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 2, 6, 3, dtype=torch.float64)
    marks = torch.rand(2, 2, 6) < 0.6
    marks[:, :, -1] = True
    index, real = pick(marks)
    read = key.gather(2, index[..., None].expand(-1, -1, -1, 3))
    got = Row(query, read, real, index, 6, None).attention()
    score = (query[:, :, None] @ key.repeat_interleave(2, 1).transpose(2, 3))[:, :, 0] / 3**0.5
    expected = score.masked_fill(~marks.repeat_interleave(2, 1), -torch.inf).softmax(-1)
    torch.testing.assert_close(got, expected)
    whole = Row(query, key, torch.ones(2, 2, 6, dtype=torch.bool), None, 6, None).attention()
    torch.testing.assert_close(whole, score.softmax(-1))


class Uneven:
    """Of some layers, another number of entries of each head, the last among them; the others stay whole."""

    def __init__(self, *layers):
        self.layers = layers

    def __call__(self, layers):
        return [self.marks(e) if e.layer in self.layers else torch.ones_like(e.held.valid) for e in layers]

    def marks(self, entries):
        place = entries.held.place
        head = torch.arange(place.shape[1])[:, None]
        return ((place * 7 + head + entries.layer) % (2 + head) == 0) | (place == place.amax())


def nothing(layer):
    return ()


# The decoder makes its mask from the first layer's cache, which fits no layer of another length.
@pytest.mark.parametrize("shorter", [(0,), (1, 2, 3), (0, 1, 2, 3)])
def test_steps_see_what_is_left(make_model, batch, spliced, by_hand, shorter):
    model, inputs = make_model(), batch("tt#ttt", "t#t#tt")
    tokens = torch.tensor([[3, 5, 1], [7, 2, 4]])
    with torch.no_grad(), attach(model, ((KV_PREFILL, Evict(nothing, Uneven(*shorter))),)):
        _, stream = model.prefill(inputs)
        before = dict(stream.run.held)
        assert tuple(before) == shorter
        got = [model.step(stream, token) for token in tokens.unbind(1)]
    for b, n in enumerate((41, 76)):
        padding = 76 - n

        def edit(number, _, place, attention, b=b, n=n, padding=padding):
            attention = attention.clone()
            for h in range(4 if number in before else 0):
                held, valid = (part[b, h // 2] for part in before[number])
                gone = torch.ones(n + 3, dtype=torch.bool)
                gone[held[valid] - padding] = False
                gone[n:] = False
                attention[h, n:, gone] = 0
            attention[:, n:] /= attention[:, n:].sum(2, keepdim=True)
            return attention

        x = torch.cat([spliced(model, inputs, b)[0], model.language.get_input_embeddings()(tokens[b])])
        with torch.no_grad():
            expected = by_hand(model, x, edit=edit)[-3:]
        for step in range(3):
            torch.testing.assert_close(got[step][b], expected[step], rtol=0, atol=1e-9)
