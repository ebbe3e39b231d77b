"""M3ID: its arithmetic by hand, and its two streams against recomputing everything without caches."""

import math
from dataclasses import replace

import pytest
import torch

from vlm.models.mitigators.m3id import M3id
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate
from vlm.models.program.layout import Layout
from vlm.models.program.program import Now
from vlm.models.program.signals import Facts
from vlm.models.pruners.fastv import Fastv


def now(main: torch.Tensor, without: torch.Tensor, step: int, roles: list[int] | None = None) -> Now:
    """What the stage sees of two distributions; a role is 0 for padding, 1 for text, 2 for an image."""
    role = torch.tensor([roles or [1]] * len(main))
    layout = Layout(*[role] * 7)
    return Now(main.log(), lambda context: without.log(), lambda layers, normed: main, step, layout)


@pytest.mark.parametrize(
    ("method", "step", "weight"),
    [
        (M3id(), 0, 0.0),
        (M3id(), 1, 0.0202013),  # exp(0.02) - 1
        (M3id(), 50, 1.7182818),  # e - 1
        (M3id(), 100, 6.3890561),  # e^2 - 1
        (M3id(), 512, 50.0),  # e^10.24 - 1 = 28 000, held at max_weight
        (M3id(t0=50), 50, 6.3890561),
        (M3id(max_weight=5.0), 100, 5.0),
        (M3id(decay=0.1), 10, 1.7182818),
        (M3id(decay=40.0), 100, 50.0),  # e^4000 is no float
    ],
)
def test_the_weight_follows_the_schedule(method, step, weight):
    method = replace(method, tau=1.1)
    got = method.logits(now(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]]), step))
    ratio = math.log(2)  # s - u is log 2, 0, -log 2
    expected = torch.tensor([[math.log(0.5) + weight * ratio, math.log(0.25), math.log(0.25) - weight * ratio]])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_confident_token_is_left_alone_row_by_row():
    main, without = torch.tensor([[0.31, 0.5, 0.19], [0.29, 0.29, 0.42]]), torch.full((2, 3), 1 / 3)
    got = M3id(tau=0.45).logits(now(main, without, 50))
    torch.testing.assert_close(got[0], main[0].log())  # 0.5 >= tau
    assert (got[1] - main[1].log()).abs().min() > 0.1


def test_time_may_begin_at_the_number_of_words_after_the_image():
    # padding, two words, an image, three words, two generated: 3 + 2 tokens count, e^(0.1 * 5) - 1 = 0.6487213
    main, without = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    got = M3id(0.1, tau=1.1, t0="prompt").logits(now(main, without, 2, [0, 1, 1, 2, 2, 1, 1, 1, 1, 1]))
    torch.testing.assert_close(got[0, 0], torch.tensor(math.log(0.5) + 0.6487213 * math.log(2)))


def test_a_cut_rules_out_what_is_implausible_with_the_image():
    main, without = torch.tensor([[0.6, 0.36, 0.04]]), torch.full((1, 3), 1 / 3)
    got = M3id(tau=1.1, cut=0.1).logits(now(main, without, 3))
    assert got[0].isinf().tolist() == [False, False, True]


def test_identical_streams_are_plain_decoding(make_model, batch):
    # without an image both streams read the same prompt
    model, inputs = make_model(), batch("tttt", "tt")
    plain = generate(model, inputs, max_new_tokens=10, stop=99)
    with attach(model, M3id(decay=1.0, tau=1.1).program(model.facts)):
        assert generate(model, inputs, max_new_tokens=10, stop=99) == plain


@pytest.mark.parametrize("cut", [False, True])
def test_generation_equals_recomputing_both_streams(make_model, batch, alone, cut):
    model, inputs = make_model(), batch("tt#ttt", "t#t#tt", "tttt", "#ttttttt")
    method = M3id(decay=0.5, tau=0.9)
    pruner = Fastv(Budget.parse("25%")).program(model.facts) if cut else ()
    with attach(model, pruner + method.program(model.facts)):
        answers = generate(model, inputs, max_new_tokens=6, stop=99)
    with attach(model, pruner):
        plain = generate(model, inputs, max_new_tokens=6, stop=99)
    assert answers != plain
    embed = model.language.get_input_embeddings()
    for b in range(4):
        row = alone(inputs, b)
        text = row.tokens[row.tokens >= 0]
        chosen: list[int] = []
        for step in range(6):
            with torch.no_grad(), attach(model, pruner):
                logits, stream = model.prefill(row)
                for token in chosen:
                    logits = model.step(stream, torch.tensor([token]))
            with torch.no_grad():
                without = model.language(inputs_embeds=embed(torch.tensor([[*text.tolist(), *chosen]])))
            s, u = logits[0].log_softmax(-1), without.logits[0, -1].log_softmax(-1)
            gamma = math.exp(-0.5 * step)
            changed = s + (1 - gamma) / gamma * (s - u) if s.exp().max() < 0.9 else s
            chosen.append(int(changed.argmax()))
        assert answers[b] == chosen


def test_neutral_settings_are_empty():
    facts = Facts(layers=4, width=32)
    assert M3id(decay=0).program(facts) == () == M3id(tau=0).program(facts)
    assert len(M3id().program(facts)) == 1
