"""SparseVLM against its procedure written out in dense matrices and loops."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.program.program import Select, Selector, llm_before
from vlm.models.program.select import top
from vlm.models.program.signals import Attention, Facts, Rated, Raters
from vlm.models.pruners.sparsevlm import _LISTS, Sparsevlm, _merged, _scaled


def raters_of(x: Tensor, image_of: Tensor, answer: int = 0) -> list[int]:
    """Places of the words after the last image that the visual tokens point to more than to the average one."""
    visual = [i for i, image in enumerate(image_of.tolist()) if image >= 0]
    words = list(range(max(visual) + 1, len(image_of) - answer))
    m = (x[visual] @ x[words].T).softmax(1).mean(0)
    found = [word for word, value in zip(words, m.tolist(), strict=True) if value > m.mean()]
    return found or words[-1:]


def gravity(model: Any, rows: Tensor, keys: Tensor) -> Tensor:
    """Scores of vectors of ones after the rotation, as a query and a key at these positions have them."""
    dim = model.decoder.layers[0].self_attn.head_dim

    def rotated(position: Tensor) -> Tensor:
        ones = torch.ones(1, 1, len(position), dim, dtype=torch.float64)
        return apply_rotary_pos_emb(ones, ones, *model.decoder.rotary_emb(ones, position_ids=position[None]))[0]

    return ((rotated(rows) @ rotated(keys).transpose(2, 3))[0, 0] / dim**0.5).clamp_min(1e-3)


def clusters(x: Tensor, score: Tensor, count: int) -> tuple[list[int], Tensor]:
    """Centres (ascending) of ``count`` clusters of the best dropped tokens, and the means; all in loops."""
    again = sorted(range(len(x)), key=lambda i: -score[i].item())[: int(0.3 * len(x)) + 1]
    recycled = sorted(again)
    apart = {(i, j): float((x[i] - x[j]).detach().norm()) / x.shape[1] ** 0.5 for i in recycled for j in recycled}
    density = {}
    for i in recycled:
        near = sorted(apart[i, j] ** 2 for j in recycled)[:count]
        density[i] = 2.718281828459045 ** (-sum(near) / len(near))
    lonely = {}
    for i in recycled:
        denser = [apart[i, j] for j in recycled if density[j] > density[i]]
        lonely[i] = min(denser) if denser else max(apart.values())
    centres = sorted(sorted(recycled, key=lambda i: -density[i] * lonely[i])[:count])
    members: dict[int, list[int]] = {c: [] for c in centres}
    for i in recycled:
        members[i if i in centres else min(centres, key=lambda c: apart[i, c])].append(i)
    return centres, torch.stack([x[members[c]].mean(0) for c in centres])


def dense(
    model: Any, x: Tensor, image_of: Tensor, counts: list[int], version: str, reindex: bool = False, answer: int = 0
) -> Any:
    """``enter`` of ``decode_by_hand`` for cuts at the inputs of layers 1, 2 ... that leave ``counts`` tokens."""
    raters = raters_of(x, image_of, answer)

    def enter(number: int, x: Tensor, place: Tensor, attention: Tensor) -> tuple[Tensor, Tensor] | None:
        if number == 0:
            return None
        image = [image_of[p] >= 0 if p < len(image_of) else False for p in place.tolist()]
        seen, text = ([i for i in range(len(place)) if image[i] == wanted] for wanted in (True, False))
        rows = [place.tolist().index(p) for p in raters]
        a = attention[:, rows][:, :, seen]  # [H,R,V]
        if version == "v2":
            position = torch.arange(len(place)) if reindex else place
            a = a / gravity(model, position[rows], position[seen])
        score = a.mean((0, 1))
        n, count = len(seen), counts[number - 1]
        made = [c for c in range(1, count + 1) if (int(0.3 * (n - count + c)) + 1) // 10 + 1 == c]
        merged = min(made[0] if made else count, count // 4) if version == "v1.5" else 0
        order = score.argsort(descending=True, stable=True).tolist()
        kept, dropped = sorted(order[: count - merged]), sorted(order[count - merged :])
        states = {i: x[i] for i in text + [seen[j] for j in kept]}
        if merged:
            centres, means = clusters(x[seen][dropped], score[dropped], merged)
            states |= {seen[dropped[c]]: mean for c, mean in zip(centres, means, strict=True)}
        return torch.stack([states[i] for i in sorted(states)]), torch.tensor(sorted(states))

    return enter


def counts_of(method: Sparsevlm, images: int) -> list[int]:
    """Tokens after each cut, from the list's own proportions."""
    first, *more = _LISTS[method.version][method.budget]
    last = round(method.keep.ratio * 36)  # type: ignore[operator]
    full = last * first / more[-1], last * more[0] / more[-1], last
    return [round(min(n, 36)) * images for n in full]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(("version", "position"), [("v1.5", None), ("v1.5", "keep"), ("v2", None), ("v2", "reindex")])
def test_sparsevlm_equals_the_dense_procedure(make_model, batch, spliced, by_hand, kind, version, position):
    model, inputs = make_model(kind), batch("tt#tttt", "t#t#ttt")
    method = Sparsevlm(Budget.parse("25%"), version, position=position)
    reindex = position == "reindex" or (position is None and version == "v1.5")
    more = torch.randint(0, 40, (2, 3), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), attach(model, method.program(model.facts)):
        out, (logits, stream) = model(inputs), model.prefill(inputs)
        for b in range(2):
            x, image_of, _ = spliced(model, inputs, b)
            enter = dense(model, x, image_of, counts_of(method, b + 1), version, reindex)
            expected = by_hand(model, x, enter=enter, reindex=reindex)
            got = model.logits(out.hidden[b][out.layout.valid[b]])
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
            torch.testing.assert_close(logits[b], expected[-1], rtol=0, atol=1e-9)
        for step in range(3):
            logits = model.step(stream, more[:, step])
            for b in range(2):
                x, image_of, _ = spliced(model, inputs, b)
                whole = torch.cat([x, model.language.get_input_embeddings()(more[b, : step + 1])])
                enter = dense(model, x, image_of, counts_of(method, b + 1), version, reindex)
                expected = by_hand(model, whole, enter=enter, reindex=reindex)
                torch.testing.assert_close(logits[b], expected[-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("heads", [1, 2, 3, 14])
def test_only_the_heads_with_the_largest_mass_count(make_model, batch, spliced, by_hand, heads):
    model, inputs = make_model(), batch("tt#tttt")
    x, image_of, _ = spliced(model, inputs)
    visual, raters, scores = torch.nonzero(image_of >= 0).flatten(), raters_of(x, image_of), []

    def edit(number: int, x: Tensor, place: Tensor, attention: Tensor) -> Tensor:
        if number == 1:
            a = attention[:, raters][:, :, visual] / gravity(model, torch.tensor(raters), visual)
            strongest = a.sum((1, 2)).argsort(descending=True)[:heads]
            scores.append(a[strongest].mean((0, 1)))
        return attention

    rating, found = Rated(1, gravity=True, heads=heads), []

    def choose(tokens: Any, count: Tensor) -> Tensor:
        found.append(tokens.signal(rating))
        return top(found[0], tokens.valid, count)

    with torch.no_grad():
        by_hand(model, x, edit=edit)
        with attach(model, ((llm_before(2), Select(Budget(tokens=5), Selector(choose, (Raters(), rating)))),)):
            model(inputs)
    torch.testing.assert_close(found[0][0], scores[0], rtol=1e-5, atol=0)


def test_published_lists_merge_what_the_authors_merge():
    # from 2.7 of the pages on the official code: kept 300, 200, 110 and so on, 309 / 204 / 113 with merged ones
    kept = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
    for budget, after in _LISTS["v1.5"].items():
        before = (576, *after[:2])
        merged = _merged(torch.tensor(before), torch.tensor(after))
        assert tuple((torch.tensor(after) - merged).tolist()) == kept[budget]
    assert _merged(torch.tensor([36, 36, 5]), torch.tensor([1, 3, 5])).tolist() == [0, 0, 0]


def test_layers_scale_with_the_depth():
    assert _scaled(32) == (2, 6, 15)
    assert _scaled(40) == (2, 8, 19)
    assert _scaled(4) == (0, 1, 2)
    assert _scaled(2) == (0,)


@pytest.mark.parametrize(("version", "budget", "keep"), [("v1.5", 128, 39), ("v2", 192, 118), ("v1.5", 64, 18)])
def test_a_published_list_comes_out_as_it_is(make_model, version, budget, keep):
    facts = make_model(layers=4).facts._replace(layers=32, visual=576)
    assert facts.shape is not None
    facts = facts._replace(shape=facts.shape.__class__(**{**vars(facts.shape), "layers": 32}))
    program = Sparsevlm(Budget(tokens=keep), version, budget).program(facts)
    assert [site.layer for site, _ in program] == [3, 7, 16]
    assert [op.keep.tokens for _, op in program] == list(_LISTS[version][budget])  # type: ignore[union-attr]


@pytest.mark.parametrize("style", ["forward", "hooks too"])
def test_gradients_are_the_dense_ones_and_checkpointing_keeps_them(
    make_model, batch, spliced, by_hand, style, checkpointing, gradients
):
    model, inputs = make_model().train(), batch("tt#ttttt")
    method = Sparsevlm(Budget.parse("25%"))
    weights = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.5]])
    with attach(model, method.program(model.facts)):
        model(inputs, weights).loss.backward()
        mine = gradients(model)
        checkpointing(model, style)
        first, second = model(inputs, weights), model(inputs._replace(images=inputs.images.flip(3)), weights)
        assert not torch.equal(first.layout.col, second.layout.col)
        (first.loss + 0 * second.loss).backward()
        again = gradients(model)
    x, image_of, token_of = spliced(model, inputs)
    enter = dense(model, x, image_of, counts_of(method, 1), "v1.5", answer=2)
    log_p = by_hand(model, x, enter=enter, reindex=True).log_softmax(-1)
    (-log_p[-3, token_of[-2]] - 0.5 * log_p[-2, token_of[-1]]).backward()
    for name, expected in gradients(model).items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(mine[name], expected, rtol=0, atol=1e-5 * scale, msg=name)
        torch.testing.assert_close(again[name], mine[name], rtol=1e-6, atol=1e-9, msg=name)


def test_an_answer_does_not_rate(make_model, batch):
    model, inputs = make_model(), batch("tt#tttttt")
    other = inputs._replace(tokens=inputs.tokens.clone())
    other.tokens[0, 6:] = (inputs.tokens[0, 6:] + 7) % 40
    weights = torch.tensor([[0.0] * 6 + [1.0] * 3])
    with torch.no_grad(), attach(model, Sparsevlm(Budget.parse("25%")).program(model.facts)):
        a, b = model(inputs, weights).layout, model(other, weights).layout
        assert torch.equal(a.col, b.col)
        assert torch.equal(a.row, b.row)
        without = model(inputs).layout, model(other).layout
        prompt = model.prefill(inputs._replace(tokens=inputs.tokens[:, :6], valid=inputs.valid[:, :6]))[1].run.last
    assert not torch.equal(without[0].col, without[1].col)  # as words of the question they would
    assert torch.equal(prompt.col[prompt.visual], a.col[a.visual])


def test_debias_moves_the_choice_to_earlier_tokens(make_model, batch):
    model, inputs = make_model(), batch("#ttt")
    means = []
    for debias in (None, Debias(3.0)):
        with attach(model, Sparsevlm(Budget.parse("25%"), "v2", debias=debias).program(model.facts)):
            layout = model(inputs).layout
        means.append(float((layout.row * 6 + layout.col)[layout.visual].float().mean()))
    assert means[1] < means[0]


def test_the_second_version_needs_rotary_positions_on_one_axis(make_model, batch):
    model = make_model()
    layout = model(batch("#ttt")).layout
    q, k = torch.randn(1, 4, 39, 8), torch.randn(1, 2, 39, 8)
    seen = Attention(q, k, k, layout.valid, {}, "auto", layout, signal=lambda signal: ~layout.visual)
    frequencies = model.decoder.rotary_emb.inv_freq
    rating = Rated(1, gravity=True)
    assert rating.read(seen._replace(frequencies=frequencies)).shape == (1, 39)
    axes = layout._replace(axes=layout.position[..., None].expand(-1, -1, 3))
    for without in (seen, seen._replace(frequencies=frequencies, layout=axes)):
        with pytest.raises(ModelError, match=r"sparsevlm: version v2 .* use v1.5"):
            rating.read(without)


def test_what_does_not_fit_is_refused():
    facts = Facts(layers=1, width=8, visual=36)
    with pytest.raises(ModelError, match="two layers or more; found 1"):
        Sparsevlm(Budget.parse("25%")).program(facts)
    with pytest.raises(ModelError, match=r"a share for each of the layers \(1,\); found \(3, 2\)"):
        Sparsevlm(Budget.parse("25%"), layers=(1,), shares=(3, 2)).program(facts._replace(layers=4))
