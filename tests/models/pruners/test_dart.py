"""DART against its procedure in loops: pivots by the strength of keys, tokens unlike them by the states that enter."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.pruners.dart import Dart


def key_norms(model: Any, layer: int, x: Tensor) -> list[float]:
    """L1 norm over all heads of each place's key in ``layer``, after the rotation, from the state that enters it."""
    block = model.decoder.layers[layer]
    a, normed = block.self_attn, block.input_layernorm(x)[None]
    k = a.k_proj(normed).unflatten(2, (-1, a.head_dim)).transpose(1, 2)
    k = a.k_norm(k) if hasattr(a, "k_norm") else k
    _, k = apply_rotary_pos_emb(k, k, *model.decoder.rotary_emb(x[None], position_ids=torch.arange(len(x))[None]))
    return k[0].abs().sum((0, 2)).tolist()


def dart(model: Any, image_of: Tensor, layer: int, keep: int, answer: int = 0, code: bool = False) -> Any:
    """``edit`` (which sees the states) and ``cut`` of ``decode_by_hand``; both for one row."""
    prompt = len(image_of) - answer
    visual = [i for i in range(prompt) if image_of[i] >= 0]
    after = [i for i in range(visual[-1] + 1, prompt)]
    before = [i for i in range(visual[-1]) if image_of[i] < 0]
    norms: list[float] = []

    def enter(number: int, x: Tensor, place: Tensor, attention: Tensor) -> tuple[Tensor, Tensor] | None:
        if number == layer - 1:
            norms[:] = key_norms(model, number, x)
        if number != layer:
            return None
        strongest = lambda some: sorted(some, key=lambda i: -norms[i])  # noqa: E731
        words = strongest(after)[:4]
        words = sorted(words + strongest(before)[: 4 - len(words)])
        own = sorted(strongest(visual)[:4])
        states = model.decoder.norm(x)
        kept, pivots = set(own), own + words
        quota = [keep // 8 if code else (keep - 4) // len(pivots) + (n < (keep - 4) % len(pivots)) for n in range(8)]
        for pivot, count in zip(pivots, quota, strict=False):
            likeness = cosine_similarity(states[pivot], states[visual], dim=1).tolist()
            left = [(value, i) for value, i in zip(likeness, visual, strict=True) if i not in kept]
            kept |= {i for _, i in sorted(left)[:count]}
        rows = torch.tensor([i for i in range(len(x)) if i in kept or i not in visual])
        return x[rows], rows

    return enter


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(("layer", "keep", "count"), [(2, 9, "exact"), (1, 14, "exact"), (3, 17, "code")])
def test_dart_equals_the_procedure_in_loops(make_model, batch, spliced, by_hand, kind, layer, keep, count):
    # the second row has two words after its image, so earlier ones are pivots too
    model, inputs = make_model(kind), batch("tt#tttttt", "tttt#tt")
    method = Dart(Budget.parse(keep), layer, count=count)
    more = torch.randint(0, 40, (2, 2), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), attach(model, method.program(model.facts)):
        out, (logits, stream) = model(inputs), model.prefill(inputs)
        kept = out.layout.visual.sum(1).tolist()
        assert kept == [keep] * 2 if count == "exact" else kept == [4 + keep // 8 * 8] * 2
        for b in range(2):
            x, image_of, _ = spliced(model, inputs, b)
            expected = by_hand(model, x, enter=dart(model, image_of, layer, keep, code=count == "code"))
            got = model.logits(out.hidden[b][out.layout.valid[b]])
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
            torch.testing.assert_close(logits[b], expected[-1], rtol=0, atol=1e-9)
        for step in range(2):
            logits = model.step(stream, more[:, step])
        for b in range(2):
            x, image_of, _ = spliced(model, inputs, b)
            x = torch.cat([x, model.language.get_input_embeddings()(more[b])])
            image_of = torch.cat([image_of, torch.tensor([-1, -1])])
            enter = dart(model, image_of, layer, keep, answer=2, code=count == "code")
            torch.testing.assert_close(logits[b], by_hand(model, x, enter=enter)[-1], rtol=0, atol=1e-9)


def test_a_prompt_without_text_keeps_what_is_unlike_its_own_pivots(make_model, batch):
    model, inputs = make_model(), batch("#")
    with attach(model, Dart(Budget.parse(9)).program(model.facts)):
        assert int(model(inputs).layout.visual.sum()) == 9


def test_an_answer_is_no_pivot(make_model, batch):
    model, inputs = make_model(), batch("tt#tttttt")
    other = inputs._replace(tokens=inputs.tokens.clone())
    other.tokens[0, 6:] = (inputs.tokens[0, 6:] + 7) % 40
    weights = torch.tensor([[0.0] * 6 + [1.0] * 3])
    with torch.no_grad(), attach(model, Dart(Budget.parse(14)).program(model.facts)):
        a, b = model(inputs, weights).layout, model(other, weights).layout
        without = model(inputs).layout, model(other).layout
    places = [(x.row * 6 + x.col)[x.visual].tolist() for x in (a, b, *without)]
    assert places[0] == places[1]
    assert places[2] != places[3]  # as words of the question they would be


def test_gradients_flow_through_what_is_kept(make_model, batch, spliced, by_hand):
    model, inputs = make_model().train(), batch("tt#tttttt")
    weights = torch.tensor([[0.0] * 7 + [1.0, 0.5]])
    with attach(model, Dart(Budget.parse(9)).program(model.facts)):
        model(inputs, weights).loss.backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    x, image_of, token_of = spliced(model, inputs)
    log_p = by_hand(model, x, enter=dart(model, image_of, 2, 9, answer=2)).log_softmax(-1)
    (-log_p[-3, token_of[-2]] - 0.5 * log_p[-2, token_of[-1]]).backward()
    for name, p in model.named_parameters():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(mine[name], p.grad, rtol=0, atol=1e-5 * scale, msg=name)
