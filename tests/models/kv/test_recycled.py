"""RefreshKV's steps against dense attention in which each head's row sees its own small set."""

from dataclasses import replace

import pytest
import torch

from vlm.models.kv.recycled import Recycled
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.cache import ReadStep


class Sets:
    """The rule, for one prompt of ``prompt`` entries: what each head of each layer reads at each generated row."""

    def __init__(self, prompt, count, every):
        self.prompt, self.count, self.every = prompt, count, every
        self.reads: dict[tuple[int, int, int], list[int]] = {}

    def best(self, paid):
        return sorted(range(len(paid)), key=lambda t: (-float(paid[t]), t))[: self.count]

    def edit(self, number, _, place, attention):
        attention = attention.clone()
        for h in range(2):
            mine = slice(2 * h, 2 * h + 2)
            chosen = self.best(attention[mine, self.prompt - 1, : self.prompt].amax(0))
            for row in range(self.prompt, len(place)):
                step = row - self.prompt + 1
                if step % self.every == 0:
                    chosen = self.best(attention[mine, row, : row + 1].amax(0))
                    continue
                reads = sorted([*chosen, row])
                self.reads[number, h, step] = reads
                hidden = torch.ones(len(place), dtype=torch.bool)
                hidden[reads] = False
                attention[mine, row] = attention[mine, row].masked_fill(hidden, 0)
                attention[mine, row] /= attention[mine, row].sum(1, keepdim=True)
                paid = attention[mine, row].amax(0)
                if len(reads) > self.count:
                    chosen.remove(min(chosen, key=lambda t, s=paid: float(s[t])))
                chosen.append(row)
        return attention


@pytest.mark.parametrize(("every", "keep"), [(50, 6), (3, 6), (2, "10%"), (1, 2), (4, 42)])
def test_steps_read_their_small_set(make_model, batch, spliced, by_hand, every, keep):
    model, inputs, steps = make_model(), batch("tt#ttt", "t#t#tt", "tttt"), 7
    tokens = torch.randint(0, 40, (3, steps))
    with torch.no_grad(), attach(model, Recycled(Budget.parse(keep), every=every).program(model.facts)):
        _, stream = model.prefill(inputs)
        got = [model.step(stream, tokens[:, step]) for step in range(steps)]
    assert stream.run.held == {}
    for b, n in enumerate((41, 76, 4)):
        x, _, _ = spliced(model, inputs, b)
        x = torch.cat([x, model.language.get_input_embeddings()(tokens[b])])
        count = keep if isinstance(keep, int) else Budget.parse(keep).of(n)
        sets = Sets(n, count, every)
        with torch.no_grad():
            expected, plain = by_hand(model, x, edit=sets.edit)[-steps:], by_hand(model, x)[-steps:]
        for step in range(steps):
            torch.testing.assert_close(got[step][b], expected[step], rtol=0, atol=1e-9)
        sizes = [(len(reads), n + step) for (_, _, step), reads in sets.reads.items()]
        assert all(size <= count + 1 for size, _ in sizes)
        assert ((expected - plain).abs().max() > 1e-3) == any(size < whole for size, whole in sizes)


def test_a_step_is_full_where_the_query_has_moved(make_model, batch):
    # layers decide for themselves, and so do the rows of a batch
    model, inputs, steps = make_model(), batch("tt#ttt", "t#t#tt"), 8
    tokens = torch.randint(0, 40, (2, steps))
    whole, moved = [], []
    method = Recycled(Budget.parse(6), refresh="query", check=2, least=0.3)

    def watch(memory, query, entries):
        cosine = torch.nn.functional.cosine_similarity(query.float(), memory["query"].float(), dim=2).mean(1)
        moved.append(((cosine < 0.3) & (entries.step % 2 == 0)).tolist())

    ((site, op),) = method.program(model.facts)
    assert isinstance(op, ReadStep)

    def read(entries, query):
        watch(entries.memory, query, entries)
        marks = op.read(entries, query)
        assert marks is not None
        whole.append([bool(marks[b][entries.held.valid[b]].all()) for b in range(2)])
        return marks

    with torch.no_grad(), attach(model, ((site, replace(op, read=read)),)):
        _, stream = model.prefill(inputs)
        for step in range(steps):
            model.step(stream, tokens[:, step])
    assert whole == moved
    flat = [row for rows in moved for row in rows]
    assert any(flat) and not all(flat)
    assert any(rows[0] != rows[1] for rows in moved)


def test_the_query_of_the_last_full_step_is_remembered(make_model, batch):
    model, inputs = make_model(), batch("tt#ttt", "t#t#tt")
    queries: list[torch.Tensor] = []

    for least, same in ((-1.0, True), (1.1, False)):  # never full, always full
        queries.clear()
        ((site, op),) = Recycled(Budget.parse(6), refresh="query", check=1, least=least).program(model.facts)
        assert isinstance(op, ReadStep)

        def seen(entries, row, op=op):
            op.seen(entries, row)
            if entries.layer == 2:
                queries.append(entries.memory["query"])

        with torch.no_grad(), attach(model, ((site, replace(op, seen=seen)),)):
            _, stream = model.prefill(inputs)
            for token in range(3):
                model.step(stream, torch.tensor([token, token]))
        assert torch.equal(queries[0], queries[2]) == same
