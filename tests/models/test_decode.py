"""The one decode loop: greedy, sampled and beams, stopping, streams that follow, and going back."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vlm.models.decoders.beam import Beam
from vlm.models.decoders.greedy import Greedy
from vlm.models.decoders.sample import Sample
from vlm.models.errors import ModelError
from vlm.models.kv.snapkv import Snapkv
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.contexts import NoImage, Noised
from vlm.models.program.decode import generate, open_streams
from vlm.models.program.program import LOGITS, Rewrite
from vlm.models.program.search import Prompts, drawn, draws, warped
from vlm.models.program.streams import Streams
from vlm.models.pruners.fastv import Fastv
from vlm.models.pruners.random import Random

QUARTER = Budget.parse("25%")
ROWS = ("tt#ttt", "t#t#tt", "tttt", "#ttttttt")


def test_greedy_equals_growing_each_row_alone(make_model, batch, spliced, by_hand):
    model, inputs = make_model(), batch("tt#ttt", "t", "#t##tt", side="left")
    answers = generate(model, inputs, max_new_tokens=6, stop=99)
    for b in range(3):
        x, _, _ = spliced(model, inputs, b)
        for token in answers[b]:
            with torch.no_grad():
                assert int(by_hand(model, x)[-1].argmax()) == token
            x = torch.cat([x, model.language.get_input_embeddings()(torch.tensor([token]))])
    assert generate(model, inputs, max_new_tokens=6, stop=99, decoder=Greedy()) == answers


def test_greedy_equals_the_generate_of_transformers(make_model, batch, spliced):
    model, inputs = make_model(), batch("tt#ttt")
    x, _, _ = spliced(model, inputs)
    stock = model.language.generate(inputs_embeds=x[None].detach(), max_new_tokens=8, do_sample=False, eos_token_id=99)
    assert generate(model, inputs, max_new_tokens=8, stop=99) == stock.tolist()


@pytest.mark.parametrize("decoder", [None, Sample(1.5)])
def test_stop_ends_a_row_and_leaves_the_others(make_model, batch, decoder):
    model, inputs = make_model(), batch("tt#ttt", "t#t", "ttttt")
    free = generate(model, inputs, max_new_tokens=8, stop=99, decoder=decoder)
    stop = free[0][3]
    stopped = generate(model, inputs, max_new_tokens=8, stop=stop, decoder=decoder)
    if decoder == Beam(
        1
    ):  # which may go on with the second-best where the best stops: compared with Transformers below
        return
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(stopped[0]) <= 3


def test_each_generated_token_is_seen_by_the_rewrite_with_its_number(make_model, batch):
    model, inputs = make_model(), batch("tt#t", "ttt")
    seen = []

    def only_the_step(now):
        seen.append((now.step, now.other(NoImage()).shape, now.layout.valid.sum(1).tolist()))
        return torch.nn.functional.one_hot(torch.full((2,), now.step), 40).double()

    with attach(model, ((LOGITS, Rewrite(only_the_step, (NoImage(),))),)):
        assert generate(model, inputs, max_new_tokens=4, stop=99) == [[0, 1, 2, 3]] * 2
    assert seen == [(step, (2, 40), [39 + step, 3 + step]) for step in range(4)]


def test_rewrites_follow_each_other(make_model, batch):
    model, inputs = make_model(), batch("tt#t")
    double, negate = Rewrite(lambda now: now.main * 2), Rewrite(lambda now: -now.main)
    logits, _ = model.prefill(inputs)
    with attach(model, ((LOGITS, double), (LOGITS, negate))):
        assert generate(model, inputs, max_new_tokens=1, stop=99) == [[int(logits[0].argmin())]]


# sampling


def test_sampling_follows_the_distribution(make_model, batch):
    logits = torch.randn(1, 20, dtype=torch.float64) * 2
    prompts = Prompts(1, 99, 2000, torch.device("cpu"), lambda: torch.tensor([12345]))
    at = draws(prompts, seed=1)[0]
    tokens = drawn(logits.expand(2000, -1), at)
    p = logits[0].softmax(-1)
    deviation = (p * (1 - p) * 2000).sqrt()
    assert ((tokens.bincount(minlength=20) - 2000 * p).abs() < 4 * deviation + 1).all()
    ruled_out = torch.full((1, 4), -torch.inf).index_fill(1, torch.tensor([2]), 0.0)
    assert drawn(ruled_out.expand(3, -1), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist() == [2, 2, 2]


def test_sampling_goes_by_its_seed(make_model, batch):
    model, inputs = make_model(), batch("tt#t")
    again = generate(model, inputs, max_new_tokens=8, stop=99, decoder=Sample(seed=3))
    assert again == generate(model, inputs, max_new_tokens=8, stop=99, decoder=Sample(seed=3))
    assert again != generate(model, inputs, max_new_tokens=8, stop=99, decoder=Sample(seed=4))


def test_draws_do_not_depend_on_the_batch_or_the_limit(make_model, batch, alone):
    model, inputs = make_model(), batch(*ROWS, side="left")
    sample = Sample(3.0, seed=1)
    together = generate(model, inputs, max_new_tokens=20, stop=99, decoder=sample)
    for b in range(4):
        one = generate(model, alone(inputs, b), max_new_tokens=20, stop=99, decoder=sample)
        assert one == [together[b]]
        assert generate(model, alone(inputs, b), max_new_tokens=5, stop=99, decoder=sample) == [together[b][:5]]
    assert len({tuple(row) for row in together}) == 4


def test_draws_go_by_text_and_pixels(make_model, batch):
    model, inputs = make_model(), batch("t#")
    other = inputs._replace(images=inputs.images + 0.5)
    flat = Rewrite(lambda now: now.main * 0)  # the same distribution for all
    with attach(model, ((LOGITS, flat),)):
        texts = [
            generate(model, some, max_new_tokens=8, stop=99, decoder=Sample())[0]
            for some in (inputs, other, inputs._replace(tokens=inputs.tokens.clamp_min(-1).where(inputs.tokens < 0, 3)))
        ]
    assert len({tuple(text) for text in texts}) == 3


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, None, 1.0), (1.5, 5, 1.0), (1.0, None, 0.6), (2.0, 9, 0.8)]
)
def test_warping_equals_the_warpers_of_transformers(temperature, top_k, top_p):
    logits, no_text = torch.randn(6, 50, dtype=torch.float64) * 3, torch.zeros(6, 0).long()
    expected = TemperatureLogitsWarper(temperature)(no_text, logits)  # type: ignore[arg-type]
    expected = expected if top_k is None else TopKLogitsWarper(top_k)(no_text, expected)  # type: ignore[arg-type]
    expected = expected if top_p == 1.0 else TopPLogitsWarper(top_p)(no_text, expected)  # type: ignore[arg-type]
    torch.testing.assert_close(warped(logits, temperature, top_k, top_p), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "sample.temperature: expected a number above 0; found 0; use greedy"),
        ({"top_p": 1.5}, "sample.top_p: expected a probability above 0 and up to 1; found 1.5"),
        ({"top_k": 0}, "sample.top_k: expected at least 1 token; found 0"),
    ],
)
def test_a_bad_option_is_refused(options, message):
    with pytest.raises(ModelError, match=message):
        Sample(**options)


# beams


def stock_beams(model, x, decoder, limit, stop):
    options = {"num_beams": decoder.width, "length_penalty": decoder.length_penalty}
    found = model.language.generate(
        inputs_embeds=x[None].detach(),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop,
        early_stopping=decoder.early_stopping,
        **options,
    )[0].tolist()
    return found[: found.index(stop)] if stop in found else found


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.5, -1.0])
def test_beam_search_equals_that_of_transformers(make_model, batch, spliced, penalty, early):
    model, inputs = make_model().float(), batch(*ROWS, side="left")
    inputs = inputs._replace(images=inputs.images.float())
    lengths = set()
    for width, stop in ((2, 11), (3, 13), (5, 29)):  # of width 1 Transformers makes greedy decoding
        decoder = Beam(width, penalty, early)
        answers = generate(model, inputs, max_new_tokens=12, stop=stop, decoder=decoder)
        for b in range(4):
            assert answers[b] == stock_beams(model, spliced(model, inputs, b)[0], decoder, 12, stop), (width, b)
        lengths |= {len(answer) for answer in answers}
    assert len(lengths) > 1  # some stopped


def brute_beams(score, width, limit):
    """Beam search over whole texts, each scored from nothing; no text ends early."""
    beams = [(0.0, [])]
    for _ in range(limit):
        grown = []
        for total, text in beams:
            values, tokens = score(text).topk(2 * width)
            grown += [(total + float(v), [*text, int(t)]) for v, t in zip(values, tokens, strict=True)]
        beams = sorted(grown, key=lambda beam: -beam[0])[:width]
    return beams[0][1]


@pytest.mark.parametrize("cut", [None, Fastv(QUARTER), Random(QUARTER)])
def test_contrastive_beams_equal_recomputing_without_caches(make_model, batch, alone, cut):
    model, inputs = make_model(), batch("tt#ttt", "t#t#t", side="left")
    noised = Noised(700)

    def logits(now):
        return 2.5 * now.main - now.other(noised) - 0.5 * now.other(NoImage())

    program = (*(cut.program(model.facts) if cut else ()), (LOGITS, Rewrite(logits, (noised, NoImage()))))
    with attach(model, program), torch.no_grad():
        answers = generate(model, inputs, max_new_tokens=4, stop=99, decoder=Beam(2))
        for b in range(2):
            row = alone(inputs, b)

            def score(text, row=row):
                contexts = (row, model.map_pixels(row, lambda x, n: noised_by_hand(x)), row.without_images())
                found = []
                for context in contexts:
                    value, stream = model.prefill(context)
                    for token in text:
                        value = model.step(stream, torch.tensor([token]))
                    found.append(value[0])
                return (2.5 * found[0] - found[1] - 0.5 * found[2]).log_softmax(-1)

            assert answers[b] == brute_beams(score, 2, 4)
    with attach(model, program[:-1]):
        assert generate(model, inputs, max_new_tokens=4, stop=99, decoder=Beam(2)) != answers


def noised_by_hand(pixels):
    """Step 700 of VCD's diffusion with the noise of the image's own seed."""
    bits = pixels.float().flatten().view(torch.int32).long()
    seed = int((bits * (torch.arange(1, len(bits) + 1) % 8191)).sum() % 2**40)
    betas = torch.linspace(-6, 6, 1000, dtype=torch.float64).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    left = (1 - betas).cumprod(0)[700]
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)).double()
    return left.sqrt() * pixels + (1 - left).sqrt() * noise


def test_beams_in_a_batch_equal_beams_alone(make_model, batch, alone):
    model, inputs = make_model(), batch(*ROWS, side="left")
    beam = Beam(4, early_stopping=True)
    together = generate(model, inputs, max_new_tokens=9, stop=11, decoder=beam)
    assert together == [generate(model, alone(inputs, b), max_new_tokens=9, stop=11, decoder=beam)[0] for b in range(4)]


def test_beams_when_all_but_one_token_is_ruled_out(make_model, batch):
    model, inputs = make_model(), batch("tt#t", "ttt")

    def one(now):
        return torch.where(torch.arange(40) == 7 + now.step, now.main, -torch.inf)

    with attach(model, ((LOGITS, Rewrite(one)),)):
        assert generate(model, inputs, max_new_tokens=3, stop=99, decoder=Beam(3)) == [[7, 8, 9]] * 2
        assert generate(model, inputs, max_new_tokens=5, stop=9, decoder=Beam(3)) == [[7, 8]] * 2


# streams that follow

FOLLOWING = {
    "plain": lambda facts: (),
    "fastv": Fastv(QUARTER).program,
    "random": Random(QUARTER).program,
    "snapkv": Snapkv(Budget.parse("50%")).program,
}
STREAMS = ((LOGITS, Rewrite(lambda now: now.main, (Noised(300), NoImage()), inner=(0, 2, 4))),)


def opened(model, inputs):
    return Streams(model, *open_streams(model, inputs), remember=True)


def same(a, b, rows=slice(None)):
    for name in a.logits:
        torch.testing.assert_close(a.logits[name][rows], b.logits[name], rtol=0, atol=1e-9)
    for layers, state in b.main.run.inner.items():
        torch.testing.assert_close(a.main.run.inner[layers][rows], state, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FOLLOWING)
def test_reordered_rows_go_on_as_what_they_have_become(make_model, batch, name):
    model, inputs = make_model(), batch(*ROWS, side="left")
    with attach(model, FOLLOWING[name](model.facts) + STREAMS), torch.no_grad():
        streams = opened(model, inputs)
        streams.step(torch.tensor([1, 2, 3, 4]))
        streams.reorder(torch.tensor([2, 0, 0, 3]))
        streams.step(torch.tensor([5, 6, 7, 8]))
        streams.reorder(torch.tensor([3, 2, 1, 1]))
        streams.step(torch.tensor([9, 10, 11, 12]))
        # row 0 is now text 3: 4 8 9; row 1 text 0: 1 7 10; rows 2 and 3 text 0: 1 6 11 and 1 6 12
        for row, (source, text) in enumerate([(3, (4, 8, 9)), (0, (1, 7, 10)), (0, (1, 6, 11)), (0, (1, 6, 12))]):
            one = opened(model, inputs).take_rows(torch.tensor([source]))
            for token in text:
                one.step(torch.tensor([token]))
            same(streams, one, slice(row, row + 1))


@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.parametrize("back", [0, 1, 3])
def test_going_back_equals_a_fresh_prefill_of_the_shortened_text(make_model, batch, name, back):
    model, inputs = make_model(), batch(*ROWS, side="left")
    texts = torch.arange(4 * 5).reshape(4, 5)
    with attach(model, FOLLOWING[name](model.facts) + STREAMS), torch.no_grad():
        streams = opened(model, inputs)
        for tokens in texts.unbind(1):
            streams.step(tokens)
        streams.rewind(texts[:, :back])
        assert streams.length == back
        fresh = opened(model, inputs)
        for tokens in texts[:, :back].unbind(1):
            fresh.step(tokens)
        same(streams, fresh)
        streams.step(texts[:, 4])  # and it can go on
        fresh.step(texts[:, 4])
        same(streams, fresh)
        held = [[some.main.cache.get_seq_length(layer) for layer in range(4)] for some in (streams, fresh)]
        assert held[0] == held[1]
        whole = streams.main.run.layouts[0]
        assert all(torch.equal(a, b) for a, b in zip(whole[:7], fresh.main.run.layouts[0][:7], strict=True))


def test_going_back_equals_a_prompt_that_holds_the_text(make_model, batch):
    # not our own steps: the text stands in the prompt
    model, inputs = make_model(), batch("tt#t", "#tt")
    with torch.no_grad():
        streams = opened(model, inputs)
        for token in (3, 4, 5, 6):
            streams.step(torch.full((2,), token))
        streams.rewind(torch.tensor([[3, 4]] * 2))
        for b, row in enumerate(("tt#t", "#tt")):
            text = inputs.tokens[b, : len(row)].tolist()
            longer = inputs._replace(
                tokens=torch.tensor([[*text, 3, 4]]),
                valid=torch.ones(1, len(row) + 2).bool(),
                images=inputs.images[b : b + 1],
                owner=torch.zeros(1).long(),
            )
            torch.testing.assert_close(streams.logits["main"][b], model.prefill(longer)[0][0], rtol=0, atol=1e-9)


def test_going_to_another_text_keeps_what_is_alike(make_model, batch):
    model, inputs = make_model(), batch("tt#t", "#tt")
    with torch.no_grad():
        streams = opened(model, inputs)
        for token in (3, 4, 5, 6):
            streams.step(torch.full((2,), token))
        steps = []
        step = model.step
        model.step = lambda stream, tokens: steps.append(tokens.tolist()) or step(stream, tokens)
        streams.rewind(torch.tensor([[3, 4, 7], [3, 4, 8]]))
        assert steps == [[7, 8]]
        del model.step
        fresh = opened(model, inputs)
        for tokens in ([3, 3], [4, 4], [7, 8]):
            fresh.step(torch.tensor(tokens))
        same(streams, fresh)


def test_prompts_without_their_images(batch):
    inputs = batch("tt#ttt", "t#t", "#t##tt", side="left")
    bare = inputs.without_images()
    assert len(bare.images) == 0 and len(bare.owner) == 0
    for b in range(3):
        text = inputs.tokens[b][inputs.valid[b] & (inputs.tokens[b] >= 0)]
        assert torch.equal(bare.tokens[b][bare.valid[b]], text)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_with_words_put_in(batch, side):
    inputs = batch("tt#ttt", "t#t", "#t##tt", "tt", side=side)
    for start in (False, True):
        longer = inputs.insert((7, 8), start)
        for b, row in enumerate(("tt#ttt", "t#t", "#t##tt", "tt")):
            text = inputs.tokens[b][inputs.valid[b]].tolist()
            at = 1 if start or "#" not in row else row.rindex("#") + 1
            assert longer.tokens[b][longer.valid[b]].tolist() == [*text[:at], 7, 8, *text[at:]]


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
