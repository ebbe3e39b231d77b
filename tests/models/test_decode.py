"""The one decode loop: greedy and sampled, stopping, streams."""

import pytest
import torch

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.decode import Sampling, generate
from vlm.models.program.program import LOGITS, Rewrite
from vlm.models.pruners.fastv import Fastv


def test_greedy_equals_growing_each_row_alone(make_model, batch, spliced, by_hand):
    model, inputs = make_model(), batch("tt#ttt", "t", "#t##tt", side="left")
    answers = generate(model, inputs, max_new_tokens=6, stop=99)
    for b in range(3):
        x, _, _ = spliced(model, inputs, b)
        for token in answers[b]:
            with torch.no_grad():
                assert int(by_hand(model, x)[-1].argmax()) == token
            x = torch.cat([x, model.language.get_input_embeddings()(torch.tensor([token]))])


def test_greedy_equals_the_generate_of_transformers(make_model, batch, spliced):
    model, inputs = make_model(), batch("tt#ttt")
    x, _, _ = spliced(model, inputs)
    stock = model.language.generate(inputs_embeds=x[None].detach(), max_new_tokens=8, do_sample=False, eos_token_id=99)
    assert generate(model, inputs, max_new_tokens=8, stop=99) == stock.tolist()


def test_stop_ends_a_row_and_leaves_the_others(make_model, batch):
    model, inputs = make_model(), batch("tt#ttt", "t#t", "ttttt")
    free = generate(model, inputs, max_new_tokens=8, stop=99)
    stop = free[0][3]
    stopped = generate(model, inputs, max_new_tokens=8, stop=stop)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(stopped[0]) <= 3


def test_each_generated_token_is_seen_by_the_rewrite_with_its_number(make_model, batch):
    model, inputs = make_model(), batch("tt#t", "ttt")
    seen = []

    def only_the_step(by_stream, step):
        seen.append((step, sorted(by_stream)))
        return torch.nn.functional.one_hot(torch.full((2,), step), 40).double()

    with attach(model, ((LOGITS, Rewrite(("no_image",), only_the_step)),)):
        assert generate(model, inputs, max_new_tokens=4, stop=99) == [[0, 1, 2, 3]] * 2
    assert seen == [(step, ["main", "no_image"]) for step in range(4)]


def test_rewrites_follow_each_other(make_model, batch):
    model, inputs = make_model(), batch("tt#t")
    double = Rewrite((), lambda by_stream, step: by_stream["main"] * 2)
    negate = Rewrite((), lambda by_stream, step: -by_stream["main"])
    logits, _ = model.prefill(inputs)
    with attach(model, ((LOGITS, double), (LOGITS, negate))):
        assert generate(model, inputs, max_new_tokens=1, stop=99) == [[int(logits[0].argmin())]]


def test_sampling_follows_the_distribution_and_the_seed(make_model, batch):
    model, inputs = make_model(), batch("tt#t")
    with torch.no_grad():
        logits, _ = model.prefill(inputs)
    many = batch(*["tt#t"] * 1)
    draws = [
        generate(model, many, max_new_tokens=1, stop=99, sampling=Sampling(2.0, seed))[0][0] for seed in range(400)
    ]
    p = (logits[0] / 2).softmax(-1)
    best = int(p.argmax())
    deviation = (p[best] * (1 - p[best]) * 400) ** 0.5
    assert abs(draws.count(best) - 400 * p[best]) < 5 * deviation
    again = generate(model, inputs, max_new_tokens=8, stop=99, sampling=Sampling(1.0, 3))
    assert again == generate(model, inputs, max_new_tokens=8, stop=99, sampling=Sampling(1.0, 3))
    assert again != generate(model, inputs, max_new_tokens=8, stop=99, sampling=Sampling(1.0, 4))


def test_prompts_without_their_images(batch):
    inputs = batch("tt#ttt", "t#t", "#t##tt", side="left")
    bare = inputs.without_images()
    assert len(bare.images) == 0 and len(bare.owner) == 0
    for b in range(3):
        text = inputs.tokens[b][inputs.valid[b] & (inputs.tokens[b] >= 0)]
        assert torch.equal(bare.tokens[b][bare.valid[b]], text)


def test_a_stream_without_images_is_not_cut(make_model, batch):
    model, inputs = make_model(), batch("tt#ttt", "tt")
    plain, _ = model.prefill(inputs.without_images())
    with attach(model, Fastv(Budget.parse("25%")).program(model.facts)):
        logits, stream = model.prefill(inputs.without_images())
        model.step(stream, torch.tensor([1, 2]))
    assert torch.equal(logits, plain)


def test_the_language_model_alone_does_not_run_under_a_program_unnoticed(make_model, batch):
    model = make_model()
    tokens = torch.tensor([[1, 2, 3]])
    with (
        attach(model, Fastv(Budget.parse("25%")).program(model.facts)),
        pytest.raises(ModelError, match="only as a part of its vision-language model"),
    ):
        model.language(input_ids=tokens)
    model.language(input_ids=tokens)
