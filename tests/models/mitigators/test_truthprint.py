"""TruthPrInt: the probe, ComnHallu's alignment, and a decode that goes back."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

from vlm.models.decoders.beam import Beam
from vlm.models.decoders.sample import Sample
from vlm.models.errors import ModelError
from vlm.models.mitigators.m3id import M3id
from vlm.models.mitigators.truthprint import Truthprint
from vlm.models.program.artifact import Calibration
from vlm.models.program.attach import attach
from vlm.models.program.backtrack import Backtrack
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate
from vlm.models.program.probe import Probe, Space, aligned, answer_states, fit_probe, load_probe, space_of, threshold_at
from vlm.models.program.program import DECODE, Control
from vlm.models.pruners.fastv import Fastv

ROWS = ("tt#ttt", "#t#tttt", "ttt")


def random_probe(layer: int = 2, kept: int | None = None, seed: int = 0) -> Probe:
    g = torch.Generator().manual_seed(seed)
    basis = None if kept is None else torch.linalg.qr(torch.randn(32, kept, generator=g)).Q
    first, second = torch.randn(8, (kept or 32) + 1, generator=g) * 3, torch.randn(1, 9, generator=g) * 3
    return Probe(layer, 0.5, Space(torch.randn(32, generator=g) * 0.1, basis), first, second)


@pytest.fixture
def probe(tmp_path) -> Calibration:
    path = tmp_path / "probe.safetensors"
    random_probe().save(path)
    return Calibration(str(path))


@pytest.mark.parametrize("kept", [None, 5])
def test_a_saved_probe_scores_as_before_and_as_written_out(tmp_path, kept):
    probe, x = random_probe(kept=kept), torch.randn(7, 32)
    probe.save(tmp_path / "x.safetensors")
    got = load_probe(str(tmp_path / "x.safetensors"))
    torch.testing.assert_close(got.score(x), probe.score(x))
    assert (got.layer, got.threshold) == (2, 0.5)
    for row, score in zip(x, got.score(x), strict=True):
        unit = (row - probe.space.centre) / (row - probe.space.centre).norm()
        read = unit if kept is None or probe.space.basis is None else probe.space.basis.T @ unit
        hidden = [max(float(w[:-1] @ read + w[-1]), 0.0) for w in probe.first]
        logit = sum(w * h for w, h in zip(probe.second[0, :-1].tolist(), hidden, strict=True)) + float(
            probe.second[0, -1]
        )
        torch.testing.assert_close(float(score), 1 / (1 + numpy.exp(-logit)), rtol=1e-4, atol=1e-6)


def test_what_is_no_probe_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"other.safetensors: expected a probe of hidden states; found another file"):
        load_probe(str(tmp_path / "other.safetensors"))
    with pytest.raises(ModelError, match=r"none.safetensors is no safetensors file"):
        load_probe(str(tmp_path / "none.safetensors"))


def labelled(count: int, shift: torch.Tensor, turn: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States whose label is a direction of theirs, within a subspace that ``turn`` places."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.tensor([8.0, 4.0, 2.0, 1.0])
    x = torch.randn(count, 4, generator=g) * spread
    x[:, 0] += 12
    return x @ turn + shift + torch.randn(count, turn.shape[1], generator=g) * 0.05, x[:, 1] > 0


def test_a_probe_learns_and_keeps_its_specificity():
    turn = torch.linalg.qr(torch.randn(16, 4)).Q.T
    states, made_up = labelled(800, torch.ones(16), turn, 1)
    probe = fit_probe(states, made_up, 3, hidden=16)
    new, truth = labelled(2000, torch.ones(16), turn, 2)
    scores = probe.score(new)
    assert float(((scores > 0.5) == truth).float().mean()) > 0.97
    assert float((scores[~truth] > probe.threshold).float().mean()) < 0.05
    assert float((scores[truth] > probe.threshold).float().mean()) > 0.8
    again = fit_probe(states, made_up, 3, hidden=16)
    assert torch.equal(again.first, probe.first) and again.threshold == probe.threshold
    with pytest.raises(
        ModelError, match=r"^probe: expected true and made-up mentions to learn from; found one kind amo"
    ):
        fit_probe(states, torch.zeros(800).bool(), 3)


@pytest.mark.parametrize("specificity", [0.5, 0.9, 0.99, 1.0])
def test_the_threshold_lets_that_share_pass(specificity):
    scores = torch.rand(101, generator=torch.Generator().manual_seed(0))
    found = threshold_at(scores, specificity)
    assert float((scores <= found).double().mean()) >= specificity
    smaller = [s for s in scores.tolist() if s < found]
    assert not smaller or float((scores <= max(smaller)).double().mean()) < specificity


def test_alignment_is_that_of_dense_matrices():
    g = torch.Generator().manual_seed(4)
    source, target = (
        torch.randn(40, 12, generator=g),
        torch.randn(30, 12, generator=g) @ torch.randn(12, 12, generator=g),
    )
    got, space = aligned(source, target, 5)

    def unit(x: numpy.ndarray) -> numpy.ndarray:
        x = x - x.mean(0)
        return x / numpy.linalg.norm(x, axis=1, keepdims=True)

    s, t = unit(source.double().numpy()), unit(target.double().numpy())
    p_s, p_t = (numpy.linalg.eigh(x.T @ x)[1][:, ::-1][:, :5] for x in (s, t))
    # directions have no sign, so what is compared is what no sign changes: products across both sides
    expected = s @ p_s @ (p_s.T @ p_t) @ p_t.T
    assert space.basis is not None
    torch.testing.assert_close((got @ space.basis.T).double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        (space.read(target) @ space.basis.T).double(), torch.from_numpy(t @ p_t @ p_t.T), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ModelError, match=r"^probe: expected at most 12 directions of these states; found 13"):
        space_of(source, 13)


def test_an_aligned_probe_reads_a_model_that_is_shifted_and_turned_a_little():
    """The target's states need no labels; a probe of the source alone is near chance there."""
    g = torch.Generator().manual_seed(7)
    turn = torch.linalg.qr(torch.randn(16, 4, generator=g)).Q.T
    other = torch.linalg.qr((turn + 0.25 * torch.randn(4, 16, generator=g)).T).R.sign().diag()[:, None] * (
        torch.linalg.qr((turn + 0.25 * torch.randn(4, 16, generator=g)).T).Q.T
    )
    states, made_up = labelled(800, torch.ones(16) * 5, turn, 1)
    target, truth = labelled(800, -torch.ones(16) * 30, other, 2)
    alone = fit_probe(states, made_up, 3, hidden=16)
    features, space = aligned(states, target, 4)
    probe = fit_probe(features, made_up, 3, hidden=16, space=space)

    def right(probe: Probe) -> float:
        return float(((probe.score(target) > 0.5) == truth).float().mean())

    assert right(probe) > 0.8 > right(alone) + 0.1


@torch.no_grad()
def test_states_are_those_that_predict_each_token(make_model, batch, alone, spliced):
    model, inputs = make_model(), batch(*ROWS, side="left")
    answers = [[3, 4, 5], [6], []]
    got = answer_states(model, inputs, answers, 2)
    assert [len(states) for states in got] == [3, 1, 0]
    for b in range(2):
        x, _, _ = spliced(model, inputs, b)
        x = torch.cat([x, model.language.get_input_embeddings()(torch.tensor(answers[b][:-1], dtype=torch.long))])
        hidden = model.language(inputs_embeds=x[None], output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(got[b], hidden[len(hidden) - len(answers[b]) :], rtol=0, atol=1e-10)


def backtracked(model: Any, row: Any, probe: Probe, threshold: float, ends: set, retries: int, limit: int) -> Any:
    """The same from whole texts, each run from nothing; how often it went back."""
    text: list[int] = []
    sure: list[float] = []
    tried: dict[int, list[int]] = {}
    used: dict[int, int] = {}
    times = 0
    while len(text) < limit:
        tokens = torch.cat([row.tokens, torch.tensor([text], dtype=torch.long)], 1)
        asked = row._replace(tokens=tokens, valid=torch.ones_like(tokens).bool())
        state = answer_states(model, asked, [[0]], probe.layer)[0]
        p = model.prefill(asked)[0][0].softmax(-1)
        begin = max([n + 1 for n, token in enumerate(text) if token in ends], default=0)
        if begin < len(text) and used.get(begin, 0) < retries and float(probe.score(state)) > threshold:
            used[begin] = used.get(begin, 0) + 1
            back = begin + int(numpy.argmin(sure[begin:]))
            tried = {n: tokens for n, tokens in tried.items() if n <= back}
            tried[back] = [*tried.get(back, []), text[back]]
            text, sure = text[:back], sure[:back]
            times += 1
            continue
        order = [token for token in p.argsort(descending=True).tolist() if token not in tried.get(len(text), [])]
        sure.append(float(p.max()))
        text.append(order[0])
        if text[-1] == 11:
            return text[:-1], times
    return text, times


@torch.no_grad()
@pytest.mark.parametrize("seed", [1, 2, 5])
def test_it_decodes_as_whole_texts_run_from_nothing(make_model, batch, alone, tmp_path, seed):
    """Going back therefore equals a fresh prefill, also to the very beginning and more than once."""
    model, inputs = make_model(), batch(*ROWS, side="left")
    probe = random_probe(seed=seed)
    ends, limit, times = {4, 9, 17, 23, 30}, 10, []
    probe.save(tmp_path / "p.safetensors")
    method = Truthprint(Calibration(str(tmp_path / "p.safetensors")), ends=tuple(ends), retries=3)
    with attach(model, method.program(model.facts)):
        answers = generate(model, inputs, max_new_tokens=limit, stop=11)
    for b in range(3):
        expected, count = backtracked(model, alone(inputs, b), probe, 0.5, ends, 3, limit)
        assert answers[b] == expected
        times.append(count)
    assert sum(times) > 3


@torch.no_grad()
def test_after_going_back_logits_are_those_of_a_fresh_prefill(make_model, batch, alone):
    """Under a pruner and a contrast of two streams too."""
    model, inputs = make_model(), batch("tt#ttt")
    seen: list[tuple[list[int], torch.Tensor]] = []

    class Watch(Backtrack):
        def score(self, scores: torch.Tensor) -> Any:
            seen.append(([said.token for said in self.state], scores.clone()))
            return super().score(scores)

        def _made_up(self) -> bool:
            return self.decode.length in (1, 3, 5)

    probe = random_probe(seed=1)
    others = Fastv(Budget.parse("50%")).program(model.facts) + M3id(1.0, 1.1).program(model.facts)
    control = Control(lambda decode: Watch(decode, probe, 0.3, {4}, 5), inner=(2,), beams=False)
    with attach(model, ((DECODE, control), *others)):
        generate(model, inputs, max_new_tokens=6, stop=99)
    lengths = [len(text) for text, _ in seen]
    assert any(b < a for a, b in pairwise(lengths)) and 0 in lengths[1:]
    forced: list[int] = []

    class Follow(Backtrack):
        def score(self, scores: torch.Tensor) -> Any:
            length = self.decode.length
            found.append(scores.clone())
            one = torch.full_like(scores, -torch.inf)
            one[:, forced[length] if length < len(forced) else 0] = 0
            return one, None

        def moved(self, move: Any) -> None: ...

    for text, scores in seen:
        forced, found = text, []
        follow = Control(lambda decode: Follow(decode, probe, 0.3, {4}, 0), beams=False)
        with attach(model, ((DECODE, follow), *others)):
            generate(model, inputs, max_new_tokens=len(text) + 1, stop=99)
        torch.testing.assert_close(found[len(text)], scores, rtol=0, atol=1e-9)


def test_sampling_goes_back_too_and_a_batch_equals_single_samples(make_model, batch, alone, probe):
    model, inputs = make_model(), batch(*ROWS, side="left")
    options: Any = {"max_new_tokens": 8, "stop": 11, "decoder": Sample(1.5)}
    with attach(model, Truthprint(probe, threshold=0.2, ends=(4,)).program(model.facts)):
        answers = generate(model, inputs, **options)
        assert answers == [generate(model, alone(inputs, b), **options)[0] for b in range(3)]
    assert answers != generate(model, inputs, **options)


def test_neutral_and_refused_settings(make_model, batch, probe, tmp_path):
    model = make_model()
    assert Truthprint(probe, retries=0).program(model.facts) == ()
    inputs = batch(*ROWS, side="left")
    with attach(model, Truthprint(probe, threshold=1.0, ends=(4,)).program(model.facts)):
        assert generate(model, inputs, max_new_tokens=6, stop=11) == generate(
            make_model(), inputs, max_new_tokens=6, stop=11
        )
        with pytest.raises(
            ModelError, match=r"^decode: this method watches one text as it grows; expected decode: greedy or"
        ):
            generate(model, inputs, max_new_tokens=1, stop=11, decoder=Beam(2))
    with pytest.raises(ModelError, match=r"^truthprint.retries: expected 0 or more; found -1"):
        Truthprint(probe, retries=-1).program(model.facts)
    with pytest.raises(ModelError, match=r"^truthprint.ends: this model comes without its tokenizer"):
        Truthprint(probe).program(model.facts)
    random_probe(layer=9).save(Path(tmp_path) / "deep.safetensors")
    with pytest.raises(
        ModelError, match=r"^truthprint.probe: expected states of width 32 after at most 4 layers; .* after 9"
    ):
        Truthprint(Calibration(str(tmp_path / "deep.safetensors"))).program(model.facts)
