"""What every cache policy promises. The folder is listed, so a new policy is held to it by being there."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm
from vlm.models.errors import ModelError
from vlm.models.mitigators.m3id import M3id
from vlm.models.mitigators.var import Var
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.cache import ReadStep
from vlm.models.program.decode import generate, open_streams
from vlm.models.program.program import Program
from vlm.models.pruners.fastv import Fastv
from vlm.models.pruners.random import Random

NAMES = sorted(path.stem for path in (Path(vlm.__file__).parent / "models" / "kv").glob("*.py"))
ROWS = ("tt#ttt", "t#t#tt", "tttttttttt", "#tttttttt")
PRUNERS = {"": None, "fastv": Fastv, "random": Random}


def policy(name: str) -> Any:
    module = importlib.import_module(f"vlm.models.kv.{name}")
    found = [c for c in vars(module).values() if is_dataclass(c) and c.__module__ == module.__name__]
    assert [c.__name__.lower() for c in found if isinstance(c, type)] == [name.replace("_", "")]
    return found[0]


def program_of(model: Any, name: str, keep: str | int = "30%", pruner: str = "", **options: Any) -> Program:
    method = PRUNERS[pruner]
    cut = () if method is None else method(keep=Budget.parse("50%")).program(model.facts)
    return cut + policy(name)(keep=Budget.parse(keep), **options).program(model.facts)


def only_reads(program: Program) -> bool:
    return all(isinstance(op, ReadStep) for _, op in program)


def at_positions(run: Any, layer: int, b: int, marks: Tensor) -> Tensor:
    """Marks [kv_heads, entries] of a layer's cache as marks [kv_heads, 200] of positions."""
    layout = run.layouts[run.stage(layer)]
    place = run.held[layer].place[b] if layer in run.held else torch.arange(marks.shape[1]).expand(marks.shape)
    seen = torch.zeros(len(marks), 200, dtype=torch.bool)
    return seen.scatter(1, layout.position[b].expand(len(marks), -1).gather(1, place), marks)


def left(run: Any, layer: int, b: int, kv_heads: int = 2) -> Tensor:
    """The positions that each head of a layer still holds, [kv_heads, 200]."""
    whole = run.layouts[run.stage(layer)].valid[b].expand(kv_heads, -1)
    return at_positions(run, layer, b, run.held[layer].valid[b] if layer in run.held else whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_treated_the_same_alone_and_in_a_batch(make_model, batch, alone, name):
    model, inputs = make_model(), batch(*ROWS)
    with attach(model, program_of(model, name)), torch.no_grad():
        logits, stream = model.prefill(inputs)
        own = [model.prefill(alone(inputs, b)) for b in range(4)]
        for token in (3, 5, 7):
            for b in range(4):
                torch.testing.assert_close(logits[b], own[b][0][0], rtol=0, atol=1e-9)
            logits = model.step(stream, torch.full((4,), token))
            own = [(model.step(s, torch.tensor([token])), s) for _, s in own]


@pytest.mark.parametrize("name", NAMES)
def test_a_full_budget_changes_no_bit(make_model, batch, name):
    model, inputs = make_model().float(), batch(*ROWS)
    inputs = inputs._replace(images=inputs.images.float())
    plain = generate(model, inputs, max_new_tokens=6, stop=99)
    assert program_of(model, name, "100%") == ()
    with attach(model, program_of(model, name, 500)):
        assert generate(model, inputs, max_new_tokens=6, stop=99) == plain


def watched(program: Program, marks: list[dict[int, Tensor]]) -> Program:
    """The same program, which writes down what each step reads where it reads only a part."""

    def watch(op: ReadStep) -> ReadStep:
        def read(entries: Any, query: Tensor) -> Tensor | None:
            found = op.read(entries, query)
            while len(marks) < entries.step:
                marks.append({})
            marks[entries.step - 1][entries.layer] = entries.held.valid if found is None else found
            return found

        return replace(op, read=read)

    return tuple((site, watch(op) if isinstance(op, ReadStep) else op) for site, op in program)


def masked(prompt: int, seen: Sequence[Sequence[Tensor]]) -> Callable[..., Tensor]:
    """An edit of dense attention: the row of generated token i sees ``seen[i][layer]`` and itself, for each head."""

    def edit(layer: int, x: Tensor, place: Tensor, attention: Tensor) -> Tensor:
        attention = attention.clone()
        group = len(attention) // len(seen[0][layer])
        for row in (place >= prompt).nonzero().flatten().tolist():
            allowed = seen[int(place[row]) - prompt][layer][:, place] | (place == place[row])
            attention[:, row] *= allowed.repeat_interleave(group, 0)
            attention[:, row] /= attention[:, row].sum(1, keepdim=True)
        return attention

    return edit


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_dense_attention_without_what_was_dropped(make_model, batch, spliced, by_hand, name, pruner):
    model, inputs, steps = make_model(), batch("tt#ttt", "t#t#tt"), 4
    tokens, marks = torch.randint(0, 40, (2, steps)), []
    seen: list[list[list[Tensor]]] = [[], []]  # [sample][generated token][layer]
    got = []
    with attach(model, watched(program_of(model, name, pruner=pruner), marks)), torch.no_grad():
        _, stream = model.prefill(inputs)
        run = stream.run
        for step in range(steps):
            before = [[left(run, layer, b) for layer in range(4)] for b in range(2)]
            got.append(model.step(stream, tokens[:, step]))
            for b in range(2):
                read = [at_positions(run, n, b, m[b]) for n, m in sorted(marks[step].items())] if marks else before[b]
                seen[b].append(read)
    for b in range(2):
        x, _, _ = spliced(model, inputs, b)
        prompt = len(x)
        x = torch.cat([x, model.language.get_input_embeddings()(tokens[b])])
        stages = {first: layout.position[b, layout.valid[b]] for first, layout in run.layouts.items()}
        cut = lambda layer, place, _, stages=stages: (  # noqa: E731
            torch.isin(place, stages[layer]).nonzero().flatten() if layer in stages else None
        )
        with torch.no_grad():
            expected = by_hand(model, x, cut=cut, edit=masked(prompt, seen[b]))[-steps:]
            plain = by_hand(model, x, cut=cut)[-steps:]
        for step in range(steps):
            torch.testing.assert_close(got[step][b], expected[step], rtol=0, atol=1e-9)
        assert (expected - plain).abs().max() > 1e-3  # what was dropped did matter


@pytest.mark.parametrize("keep", [1, 5, "30%"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_held_is_within_the_budget(make_model, batch, name, keep):
    model, inputs = make_model(), batch(*ROWS)
    method, lengths = policy(name)(keep=Budget.parse(keep)), (41, 76, 10, 44)
    with attach(model, method.program(model.facts)), torch.no_grad():
        _, stream = model.prefill(inputs)
    for b, length in enumerate(lengths):
        held = torch.stack([left(stream.run, layer, b) for layer in range(4)])  # [layers, KV, positions]
        budget = Budget.parse(keep).of(length)
        if only_reads(method.program(model.facts)):
            assert held.sum(2).unique().tolist() == [length]
            continue
        count = held.sum(2).double()
        assert count.mean() <= budget
        assert count.mean() >= 0.6 * budget - 0.5  # budgets are used
        if name not in ("adakv", "taskkv"):  # whose heads share a layer's budget
            assert bool((count == count[:, :1]).all())
        if name not in ("pyramidkv", "tappa", "vlcache"):  # whose layers share one budget
            assert count.mean(1).max() <= budget
        window = getattr(method, "window", None)
        if isinstance(window, int):
            window = max(min(window, budget // 2), 1)
            assert bool(held[:, :, length - window : length].all())


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_is_not_longer_than_the_budget_stays_whole(make_model, batch, name):
    model, inputs = make_model(), batch(*ROWS)
    with attach(model, program_of(model, name, 12)), torch.no_grad():
        _, stream = model.prefill(inputs)
        for layer in range(4):
            assert left(stream.run, layer, 2)[:, :10].all()  # ten words, in a batch with 41, 76 and 44 tokens


@pytest.mark.parametrize("name", NAMES)
def test_what_is_dropped_is_freed_and_counted(make_model, batch, name):
    model, inputs = make_model(), batch(*ROWS)
    entry = 8 * 8  # bytes of a key of 8 doubles
    with attach(model, program_of(model, name)), torch.no_grad():
        _, stream = model.prefill(inputs)
        for step in range(3):
            counted = stream.run.cached_tokens(4)
            layers = stream.cache.layers
            for layer in range(4):
                mean = sum(left(stream.run, layer, b).sum().item() for b in range(4)) / 8
                assert counted[layer] == pytest.approx(mean)
                if only_reads(program_of(model, name)):
                    assert layers[layer].keys.nbytes == 4 * 2 * (76 + step) * entry
                else:
                    assert layers[layer].keys.nbytes == layers[layer].values.nbytes == 8 * mean * entry
                    assert layers[layer].keys.untyped_storage().nbytes() == layers[layer].keys.nbytes
            model.step(stream, torch.tensor([1, 2, 3, 4]))
            assert stream.run.last.position[:, -1].tolist() == [n + step for n in (41, 76, 10, 44)]


@pytest.mark.parametrize("name", NAMES)
def test_rows_can_be_reordered(make_model, batch, name):
    # as a beam search does after each token
    model, inputs, index = make_model(), batch("tt#ttt", "t#t#tt", "#ttttt"), torch.tensor([1, 1, 2, 0])
    with attach(model, program_of(model, name)), torch.no_grad():
        _, stream = model.prefill(inputs)
        model.step(stream, torch.tensor([3, 4, 5]))
        other = stream.take_rows(index)
        for step in range(3):
            moved = model.step(other, torch.tensor([step, step, step + 1, step + 2]))
            plain = model.step(stream, torch.tensor([step + 2, step, step + 1]))
            torch.testing.assert_close(moved, plain[index], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_both_streams_of_m3id_are_held_to_it(make_model, batch, alone, name):
    model, inputs = make_model(), batch("tt#ttt", "tt#tttttttt")
    kv, m3id = program_of(model, name), M3id(decay=1.0, tau=1.1).program(model.facts)
    with attach(model, kv):
        plain = generate(model, inputs, max_new_tokens=4, stop=99)
    with attach(model, kv + m3id):
        answers = generate(model, inputs, max_new_tokens=4, stop=99)
        assert answers[0] == generate(model, alone(inputs, 0), max_new_tokens=4, stop=99)[0]
        _, streams = open_streams(model, inputs)
    assert answers != plain
    assert len(streams) == 2
    for stream in streams.values():
        length = stream.run.layouts[0].valid.sum(1).double().mean()
        mean = sum(stream.run.cached_tokens(4)) / 4
        assert mean == length if only_reads(kv) else mean < 0.5 * length


@pytest.mark.parametrize("name", NAMES)
def test_it_is_refused_together_with_a_rule_on_attention(make_model, name):
    model = make_model()
    both = program_of(model, name) + Var(tau=2.0).program(model.facts)
    with pytest.raises(ModelError, match="use a cache policy or an attention mitigator, not both"), attach(model, both):
        pass
    with pytest.raises(ModelError, match=r"kv: two cache policies at once"), attach(model, 2 * program_of(model, name)):
        pass


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_another_kind_is_refused(make_model, name):
    with pytest.raises(ModelError, match=r"kv.keep: expected a share of the prompt or a number of entries.*average 9"):
        policy(name)(keep=Budget.parse({"average": 9})).program(make_model().facts)
