"""OPERA: its penalty by hand, its looks ahead against recomputation without caches, and its way back."""

import math
from typing import Any

import pytest
import torch

from vlm.models.decoders.beam import Beam
from vlm.models.decoders.sample import Sample
from vlm.models.errors import ModelError
from vlm.models.kv.snapkv import Snapkv
from vlm.models.mitigators.opera import Opera
from vlm.models.mitigators.vcd import Vcd
from vlm.models.program.attach import attach, check
from vlm.models.program.budget import Budget
from vlm.models.program.control import Decode
from vlm.models.program.decode import generate, open_streams
from vlm.models.program.overtrust import OverTrust, over_trust
from vlm.models.program.search import BeamSearch, Prompts
from vlm.models.program.streams import Streams
from vlm.models.pruners.fastv import Fastv
from vlm.models.pruners.random import Random

QUARTER = Budget.parse("25%")


def test_a_neutral_setting_is_the_empty_program(make_model):
    assert Opera(penalty=0.0, threshold=None).program(make_model().facts) == ()


@pytest.mark.parametrize("length", [4, 10, 11, 14])
def test_the_penalty_is_the_largest_column_product(length):
    attention = torch.rand(length, length, dtype=torch.float64).tril() / 10
    penalty, place = over_trust(attention, torch.tensor(0.3), 20.0)
    products = [
        1e-7 * math.prod(20.0 * float(attention[row, column]) for row in range(column, length))
        for column in range(length)
    ]
    assert int(place) == max(range(length), key=products.__getitem__)
    assert float(penalty) == pytest.approx(-0.3 if length <= 10 else max(products))


def test_a_product_that_no_float_holds_stays_a_number():
    penalty, place = over_trust(torch.ones(300, 300).tril(), torch.tensor(0.0), 50.0)
    assert float(penalty) == 1e9
    assert int(place) == 0


def a_decode(model: Any, inputs: Any, width: int, tokens: list[list[int]]) -> tuple[Any, Any]:
    """The decode of one prompt with ``width`` beams that have grown ``tokens`` (each a list of one token a beam)."""
    streams = Streams(model, *open_streams(model, inputs)).take_rows(torch.zeros(width).long(), remember=True)
    search = BeamSearch(Prompts(1, 99, 50, torch.device("cpu"), lambda: torch.zeros(1).long()), width, 1.0, False)
    for step in tokens:
        search.advance(search.score(streams.logits["main"]))
        streams.step(torch.tensor(step))
    return Decode(streams, search), streams


@pytest.mark.parametrize("pruner", [None, Fastv(QUARTER), Random(QUARTER)])
@pytest.mark.parametrize("length", [0, 3, 11])
def test_scores_equal_recomputing_every_continuation(make_model, batch, spliced, by_hand, pruner, length):
    model, inputs = make_model(), batch("tt#ttt")
    texts = torch.randint(0, 40, (2, length), generator=torch.Generator().manual_seed(1))
    opera = Opera(candidates=3, scale=8.0, penalty=0.7, threshold=None)
    cut = pruner.program(model.facts) if pruner else ()
    with attach(model, cut + opera.program(model.facts)), torch.no_grad():
        decode, streams = a_decode(model, inputs, 2, [])
        controller = model.engine.control.begin(decode)
        scores, got, back = torch.empty(0), torch.empty(0), None
        for step in range(length + 1):
            scores = streams.logits["main"].log_softmax(-1)
            got, back = controller.score(scores)
            if step < length:
                streams.step(texts[:, step])
        assert back is None
        rows = streams.main.run.last
        assert rows.role.shape[1] == int(rows.valid[0].sum())  # nothing is left of the looks ahead
    kept = streams.main.run.last
    x, image, _ = spliced(model, inputs)
    for beam in range(2):
        tried = scores[beam].topk(3).indices.tolist()
        for token in range(40):
            if token not in tried:
                assert float(got[beam, token]) == pytest.approx(float(scores[beam, token]) - 999)
        if pruner:  # the layers before the cut see what the others do not, so only the pruned row is looked at
            continue
        for token in tried:
            text = torch.tensor([*texts[beam].tolist(), token])
            seen: dict[int, torch.Tensor] = {}
            with torch.no_grad():
                whole = torch.cat([x, model.language.get_input_embeddings()(text)])
                by_hand(model, whole, edit=lambda layer, x, place, a, seen=seen: seen.setdefault(layer, a))
            most = seen[3].amax(0)
            most = most / most.sum(1, keepdim=True)
            window = most[len(x) :, len(x) :]
            penalty = -most[-1, : len(x)][image >= 0].sum()
            if len(text) > 10:
                products = [1e-7 * (8.0 * window[j:, j]).prod() for j in range(len(text))]
                penalty = torch.stack(products).max()
            assert float(got[beam, token]) == pytest.approx(float(scores[beam, token] - 0.7 * penalty), abs=1e-9)
    assert kept.visual.sum() == 2 * (9 if pruner else 36)


class Scripted(OverTrust):
    """An over-trust controller that is told which token every continuation leans on."""

    leans: int = 10

    def _try(self, scores: Any, attention: Any) -> Any:
        tokens = scores.topk(self.candidates, dim=1).indices
        return torch.zeros(tokens.shape), torch.full(tokens.shape, self.leans), tokens


def scripted(model: Any, inputs: Any, threshold: int, candidates: int, limit: int) -> tuple[list[int], list[Any]]:
    """The answer, and each time the decode went back: the beams before and after, and their logits."""
    streams = Streams(model, *open_streams(model, inputs)).take_rows(torch.zeros(2).long(), remember=True)
    search = BeamSearch(Prompts(1, 99, limit, torch.device("cpu"), lambda: torch.zeros(1).long()), 2, 1.0, False)
    decode, went = Decode(streams, search), []
    controller = Scripted(decode, model.engine.control.needs[0], candidates, 1.0, 0.0, threshold)
    while True:
        had = search.tokens.tolist()
        move = decode.choose(controller, search.score(streams.rewritten(model.engine.rewrites)))
        if move is None:
            went.append((had, search.tokens.tolist(), streams.logits["main"].clone()))
            continue
        if search.finished:
            return search.answers()[0], went
        assert move.rows is not None
        streams.reorder(move.rows)
        streams.step(move.tokens)


@torch.no_grad()
def test_going_back_brings_texts_and_logits_back_and_rules_out_what_was_chosen(make_model, batch):
    model, inputs = make_model(), batch("tt#ttt")
    with attach(model, Opera().program(model.facts)):
        free, none = scripted(model, inputs, 10**6, 2, 24)
        answer, went = scripted(model, inputs, 15, 2, 24)
        assert none == [] and len(free) == 24
        # 16 times leant on token 10 at length 15: back to 11 tokens; there nothing has been ruled out yet. Then every
        # 16th time again, till 11 and then 10 have been gone back to twice each.
        lengths = [(len(before[0]), len(after[0])) for before, after, _ in went]
        assert lengths == [(15, 11), (15, 11), (15, 10), (15, 10)]
        for _, tokens, logits in went:
            value, fresh = None, model.prefill(inputs)[1].take_rows(torch.zeros(2).long())
            for token in torch.tensor(tokens).unbind(1):
                value = model.step(fresh, token)
            torch.testing.assert_close(logits, value, rtol=0, atol=1e-9)
        for earlier, later in ((0, 1), (2, 3)):  # the same beams as before at that length, and other tokens after them
            assert went[earlier][1] == went[later][1]
            end = len(went[earlier][1][0])
            tried = [{tuple(text[: end + 1]) for text in went[n][0]} for n in (earlier, later)]
            assert not tried[0] & tried[1]
        assert answer != free


@pytest.mark.parametrize(("pruner", "stage"), [(None, None), (Fastv(QUARTER), Vcd(step=900))])
def test_a_batch_equals_single_samples(make_model, batch, alone, pruner, stage):
    model, inputs = make_model(), batch("tt", "#t#ttt", side="left")
    more = tuple(pair for method in (pruner, stage) if method for pair in method.program(model.facts))
    options: Any = {"max_new_tokens": 13, "stop": 11, "decoder": Beam(2)}
    with attach(model, more + Opera(candidates=2, scale=30.0, penalty=9.0, threshold=3).program(model.facts)):
        answers = generate(model, inputs, **options)
        assert answers == [generate(model, alone(inputs, b), **options)[0] for b in range(2)]
    with attach(model, more):
        assert generate(model, inputs, **options) != answers


@pytest.mark.parametrize(("decoder", "found"), [(None, "greedy"), (Sample(), "sample")])
def test_without_beams_it_is_refused(make_model, batch, decoder, found):
    model = make_model()
    message = f"^decode: this method ranks the beams of a beam search; expected decode: beam, found {found}$"
    with attach(model, Opera().program(model.facts)), pytest.raises(ModelError, match=message):
        generate(model, batch("t#t"), max_new_tokens=3, stop=99, decoder=decoder)


def test_two_controllers_and_cache_policies_are_refused(make_model):
    facts = make_model().facts
    opera = Opera().program(facts)
    with pytest.raises(ModelError, match=r"^decode: two decode controllers at once"):
        check(opera * 2, facts)
    with pytest.raises(ModelError, match=r"^decode: a decode controller looks at the attention to every token"):
        check(opera + Snapkv(QUARTER).program(facts), facts)


@pytest.mark.parametrize("options", [{"candidates": 0}, {"scale": 0.0}])
def test_bad_options_are_refused(make_model, options):
    with pytest.raises(ModelError, match=r"^opera: candidates and scale must be above 0; found "):
        Opera(**options).program(make_model().facts)
