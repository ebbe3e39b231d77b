"""SGL: a guide's attention in dense matrices, from the model itself or a second one, and the early exit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlm.models.errors import ModelError
from vlm.models.mitigators.var import Var
from vlm.models.program.ahead import PROBE, Stop, run_on
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate
from vlm.models.program.guide import Guide, draft, log_likelihood, visual_importance
from vlm.models.program.observe import observe
from vlm.models.program.program import VIT_OUT, Rescore, Select, attn, llm_before
from vlm.models.program.select import attention_from_last_row, even_stride, top_by
from vlm.models.pruners.sgl import Sgl


def importance(by_hand: Any, model: Any, x: Tensor, image_of: Tensor, rows: list[int]) -> Tensor:
    """Attention of each visual token from ``rows``, summed over all layers and heads."""
    visual, total = torch.nonzero(image_of >= 0).flatten(), []

    def edit(number: int, x: Tensor, place: Tensor, attention: Tensor) -> Tensor:
        total.append(attention[:, rows].sum((0, 1))[visual])
        return attention

    by_hand(model, x, edit=edit)
    return torch.stack(total).sum(0)


def top_cut(image_of: Tensor, score: Tensor, layer: int, keep: int) -> Any:
    visual = torch.nonzero(image_of >= 0).flatten()
    kept = visual[score.argsort(descending=True, stable=True)[:keep]]
    rows = torch.cat([kept, torch.nonzero(image_of < 0).flatten()]).sort().values
    return lambda number, place, attention: rows if number == layer else None


def question(image_of: Tensor) -> list[int]:
    return list(range(int(torch.nonzero(image_of >= 0).max()) + 1, len(image_of)))


@pytest.mark.parametrize("guided_by", ["self", "a second model"])
@pytest.mark.parametrize("last_visual", [False, True])
def test_sgl_equals_the_dense_procedure(make_model, batch, spliced, by_hand, guided_by, last_visual):
    model, inputs = make_model(), batch("tt#ttt", "t#t#t")
    small = make_model(layers=2) if guided_by != "self" else None
    method = Sgl(Budget.parse("25%"), 2, Guide(small), last_visual=last_visual)
    with torch.no_grad(), attach(model, method.program(model.facts)):
        out, (logits, _) = model(inputs), model.prefill(inputs)
        for b in range(2):
            x, image_of, _ = spliced(model, inputs, b)
            rows = question(image_of)
            rows = [rows[0] - 1, *rows] if last_visual else rows
            guide = small or model
            score = importance(by_hand, guide, spliced(guide, inputs, b)[0], image_of, rows)
            expected = by_hand(model, x, cut=top_cut(image_of, score, 2, len(score) // 4))
            got = model.logits(out.hidden[b][out.layout.valid[b]])
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
            torch.testing.assert_close(logits[b], expected[-1], rtol=0, atol=1e-9)
    assert small is None or small.engine is None


def test_the_answer_s_rows_count_up_to_its_end(make_model, batch, spliced, by_hand):
    model, inputs = make_model(), batch("tt#ttt", "t#t#tttt")
    free = generate(model, inputs, max_new_tokens=5, stop=99)
    stop = free[0][2]
    answers = generate(model, inputs, max_new_tokens=5, stop=stop)
    assert len(answers[0]) < len(answers[1])
    with torch.no_grad():
        found = visual_importance(model, inputs, generated=5, stop=stop)
        for b in range(2):
            x, image_of, _ = spliced(model, inputs, b)
            written = model.language.get_input_embeddings()(torch.tensor(answers[b], dtype=torch.long))
            longer = torch.cat([image_of, torch.full((len(answers[b]),), -1)])
            expected = importance(by_hand, model, torch.cat([x, written]), longer, question(longer))
            torch.testing.assert_close(found[b][: len(expected)], expected, rtol=0, atol=1e-9)
            assert not found[b][len(expected) :].any()


@pytest.mark.parametrize("others", ["alone", "with VAR", "with a cut in the encoder"])
def test_a_pass_aside_is_the_bare_model_s_and_leaves_the_program_as_it_was(make_model, batch, others):
    model, inputs = make_model(class_token=True, blocks=4), batch("tt#ttt", "t#t")
    bare = visual_importance(model, inputs)
    assert model.engine is None
    program = ((llm_before(2), Select(Budget.parse("25%"), attention_from_last_row(1))),)
    if others == "with VAR":
        program = (*program, *Var(tau=1.5, taken=0.9, image_min=0.0, rho=0.0).program(model.facts))
    if others == "with a cut in the encoder":
        program = ((VIT_OUT, Select(Budget.parse("50%"), even_stride())), *program)
    with torch.no_grad(), attach(model, program):
        before = model(inputs)
        assert torch.equal(visual_importance(model, inputs), bare)
        with pytest.raises(KeyError), observe(model, lambda layer, seen: None):
            raise KeyError
        after = model(inputs)
    assert torch.equal(after.hidden, before.hidden)
    assert torch.equal(after.layout.col, before.layout.col)


@pytest.mark.parametrize("others", ["alone", "behind the cut", "before the cut", "in the encoder"])
def test_the_pass_itself_is_watched_where_nothing_acts_before_the_cut(make_model, batch, others):
    model, inputs = make_model(class_token=True, blocks=4), batch("tt#ttt", "t#t#t")
    cut = Sgl(Budget.parse("25%"), 2).program(model.facts)
    (signal,) = cut[0][1].selector.needs  # type: ignore[union-attr]
    own = top_by(replace(signal, watch=None))  # type: ignore[type-var]
    aside = ((cut[0][0], replace(cut[0][1], selector=own)),)  # type: ignore[type-var]
    double = Rescore(scores=lambda scores, keys: scores * 2)
    more: Any = {
        "alone": (),
        "behind the cut": ((attn(2), double), (attn(3), double)),
        "before the cut": ((attn(1), double),),
        "in the encoder": ((VIT_OUT, Select(Budget.parse("50%"), even_stride())),),
    }[others]
    begun: list[int] = []
    for number, module in enumerate((model.vision, *model.decoder.layers)):
        module.register_forward_pre_hook(lambda module, args, number=number: begun.append(number))
    found, counts = [], []
    for program in (cut, aside):
        begun.clear()
        with torch.no_grad(), attach(model, (*more, *program)):
            logits, stream = model.prefill(inputs)
            counts.append([begun.count(number) for number in range(5)])
            found.append((logits, model.step(stream, logits.argmax(1)), stream.run.last.source))
            assert not stream.run.watchers
    twice = [2, 2, 2, 2, 2]
    assert counts == [[1, 1, 1, 2, 2] if others in ("alone", "behind the cut") else twice, twice]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_looking_on_draws_no_dropout_of_the_pass():
    class Layer(nn.Module):
        def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
            if kwargs.get(PROBE):
                raise Stop(hidden, hidden, None)
            assert kwargs["past_key_values"] is None
            return nn.functional.dropout(hidden, 0.5, self.training)

    before = torch.get_rng_state()
    q = run_on([Layer(), Layer()], torch.ones(1, 9, 2, requires_grad=True), {"past_key_values": 1}).q
    assert not q.requires_grad
    assert 0 < int((q == 0).sum()) < q.numel()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_answer_that_is_learned_has_no_say(make_model, batch):
    model, inputs = make_model(), batch("tt#tttttt")
    other = inputs._replace(tokens=inputs.tokens.clone())
    other.tokens[0, 6:] = (inputs.tokens[0, 6:] + 7) % 40
    weights = torch.tensor([[0.0] * 6 + [1.0] * 3])
    prompt = inputs._replace(tokens=inputs.tokens[:, :6], valid=inputs.valid[:, :6])
    scores = [visual_importance(model, *given) for given in ((inputs, weights), (other, weights), (prompt, None))]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(scores[0], scores[2], rtol=0, atol=1e-12)
    with attach(model, Sgl(Budget.parse(9)).program(model.facts)):
        trained, asked = model(inputs, weights).layout, model.prefill(prompt)[1].run.last
    assert torch.equal(trained.col[trained.visual], asked.col[asked.visual])
    with pytest.raises(ModelError, match="expected generated 0, found 4"):
        visual_importance(model, inputs, weights, generated=4)


def test_gradients_do_not_go_through_the_guide_and_survive_checkpointing(make_model, batch, spliced, by_hand):
    model, inputs = make_model().train(), batch("tt#ttt")
    weights = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 0.5]])
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.language.gradient_checkpointing_enable({"use_reentrant": False})
        with attach(model, Sgl(Budget.parse(9), 2).program(model.facts)):
            model(inputs, weights).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    x, image_of, token_of = spliced(model, inputs)
    with torch.no_grad():
        score = importance(by_hand, model, x, image_of, question(image_of)[:-2])
    log_p = by_hand(model, x, cut=top_cut(image_of, score, 2, 9)).log_softmax(-1)
    (-log_p[-3, token_of[-2]] - 0.5 * log_p[-2, token_of[-1]]).backward()
    for name, p in model.named_parameters():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(found[0][name], p.grad, rtol=0, atol=1e-5 * scale, msg=name)
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-6, atol=1e-9, msg=name)


def test_a_guide_with_other_tokens_is_refused(make_model, batch):
    model, small, inputs = make_model(), make_model(shuffle=2), batch("tt#ttt")
    with pytest.raises(ModelError, match="expected the model's 36 visual tokens of an image; found 9"):
        Sgl(Budget.parse(9), guide=Guide(small)).program(model.facts)
    # where their number depends on the image, a pass tells
    program = Sgl(Budget.parse(9), guide=Guide(small)).program(model.facts._replace(visual=None))
    message = r"expected scores of \(rows, visual tokens\) \(1, 36\); found \(1, 9\)"
    with attach(model, program), pytest.raises(ModelError, match=message):
        model(inputs)


def test_a_guide_is_named_and_loaded_by_whoever_built_the_model(make_model):
    assert Guide.parse("self").model is None
    named, small = Guide.parse("a/small-model"), make_model(layers=2)
    assert str(named) == "a/small-model"
    asked = []
    facts = make_model().facts._replace(companion=lambda name: asked.append(name) or small)
    assert named.of(facts, "sgl").model is small
    assert asked == ["a/small-model"]
    with pytest.raises(ModelError, match="built from a recipe, to load 'a/small-model'"):
        named.of(make_model().facts, "sgl")
    with pytest.raises(ValueError, match="hub name or folder"):
        Guide.parse(3)


def rows_of(inputs: Any, rows: Any) -> Any:
    """Some rows of a batch, with their images."""
    image = [n for row in rows for n in (inputs.owner == row).nonzero()[:, 0].tolist()]
    owner = [at for at, row in enumerate(rows) for _ in range(int((inputs.owner == row).sum()))]
    return inputs._replace(
        tokens=inputs.tokens[rows], valid=inputs.valid[rows], images=inputs.images[image], owner=torch.tensor(owner)
    )


def test_who_is_sure_answers_and_the_model_runs_for_the_others_only(make_model, batch, monkeypatch):
    model, small, inputs = make_model(), make_model(layers=2), batch("tt#ttt", "t#t#tttt", "t#tt")
    drafted = draft(small, inputs, threshold=0.0, max_new_tokens=4, stop=99)
    score = (drafted.confidence + drafted.consistency) / 2
    between = float(score.sort().values[:2].mean())
    left = [int(score.argmin())]
    method = Sgl(Budget.parse("25%"), 2, Guide(small), exit=between)
    seen, prefill = [], model.prefill
    monkeypatch.setattr(
        model, "prefill", lambda inputs, *more: seen.append(len(inputs.tokens)) or prefill(inputs, *more)
    )
    with attach(model, method.program(model.facts)):
        found = generate(model, inputs, max_new_tokens=4, stop=99, subset=lambda rows: rows_of(inputs, rows))
        assert (model.engine.asked, model.engine.answered) == (3, 2)
        with pytest.raises(ModelError, match="expected subset, found none"):
            generate(model, inputs, max_new_tokens=4, stop=99)
    assert seen == [1]
    assert [found[row] for row in range(3) if row not in left] == [
        answer for row, answer in enumerate(drafted.answers) if row not in left
    ]
    # the row that is left: the guide's whole answer has a say, and nobody else in the batch does
    guided = Sgl(Budget.parse("25%"), 2, Guide(small), generated=4, stop=99)
    with attach(model, guided.program(model.facts)):
        assert [found[left[0]]] == generate(model, rows_of(inputs, left), max_new_tokens=4, stop=99)


@pytest.mark.parametrize(("threshold", "passes", "share"), [(-1.0, 0, 2), (2.0, 1, 0)])
def test_all_or_none_may_leave_early(make_model, batch, monkeypatch, threshold, passes, share):
    model, small, inputs = make_model(), make_model(layers=2), batch("tt#ttt", "t#t#tttt")
    seen, prefill = [], model.prefill
    monkeypatch.setattr(model, "prefill", lambda *given: seen.append(given) or prefill(*given))
    with attach(model, Sgl(Budget.parse("25%"), 2, Guide(small), exit=threshold).program(model.facts)):
        found = generate(model, inputs, max_new_tokens=3, stop=99)
        assert model.engine.answered == share
    assert len(seen) == passes
    by = small if share else model
    with attach(
        by, () if share else Sgl(Budget.parse("25%"), 2, Guide(small), generated=3, stop=99).program(model.facts)
    ):
        assert found == generate(by, inputs, max_new_tokens=3, stop=99)


def test_the_model_itself_cannot_answer_first(make_model):
    with pytest.raises(ModelError, match="expected a guide that answers first"):
        Sgl(Budget.parse("25%"), exit=0.5).program(make_model().facts)


def test_the_early_exit_s_scores_are_the_dense_ones(make_model, batch, spliced, by_hand):
    model, inputs, stop = make_model(), batch("tt#ttt", "t#t#tttt"), 99
    found = draft(model, inputs, threshold=0.0, max_new_tokens=4, stop=stop, keep=Budget.parse(3))
    assert found.answers == generate(model, inputs, max_new_tokens=4, stop=stop)
    with torch.no_grad():
        for b in range(2):
            answer = found.answers[b]
            x, image_of, _ = spliced(model, inputs, b)
            x = torch.cat([x, model.language.get_input_embeddings()(torch.tensor(answer))])
            longer = torch.cat([image_of, torch.full((len(answer),), -1)])
            score = importance(by_hand, model, x, longer, question(longer))
            torch.testing.assert_close(found.importance[b][: len(score)], score, rtol=0, atol=1e-9)
            rows = range(len(x) - len(answer) - 1, len(x) - 1)
            full = by_hand(model, x).softmax(-1)[list(rows), answer]
            assert float(found.confidence[b]) == pytest.approx(float(full.prod()) ** (1 / len(answer)), rel=1e-6)
            assert torch.equal(full, by_hand(model, x).softmax(-1)[list(rows)].amax(1))
            few = by_hand(model, x, cut=top_cut(longer, score, 0, 3 * (b + 1))).softmax(-1)
            few = few[range(len(few) - len(answer) - 1, len(few) - 1), answer]
            assert float(found.consistency[b]) == pytest.approx(float(few.prod()), rel=1e-6)
    mean = (found.confidence + found.consistency) / 2
    between = float(mean.mean())
    again = draft(model, inputs, threshold=between, max_new_tokens=4, stop=stop, keep=Budget.parse(3))
    assert again.exits.tolist() == (mean > between).tolist()
    assert sorted(again.exits.tolist()) == [False, True]


def test_an_empty_answer_never_exits(make_model, batch):
    model, inputs = make_model(), batch("tt#ttt", "t#t#tttt")
    stop = generate(model, inputs, max_new_tokens=1, stop=99)[0][0]
    found = draft(model, inputs, threshold=-1.0, max_new_tokens=2, stop=stop)
    assert found.answers[0] == []
    assert found.exits.tolist() == [False, True]
    assert log_likelihood(model, inputs, [[], []]).tolist() == [0, 0]
