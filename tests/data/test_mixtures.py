"""Mixtures: sources read by share or a number of times, and states of other mixtures or changed shards refused."""

import functools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.batch import Example, collate
from vlm.data.errors import DataError
from vlm.data.index import build_index, load_manifest
from vlm.data.order import Order
from vlm.data.schema import Message, Part, Sample
from vlm.data.store import Store
from vlm.data.stream import SampleStream, StreamConfig, merge_states
from vlm.data.write import write_shards


@settings(max_examples=40, deadline=None)
@given(
    sources=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4)), min_size=1, max_size=4),
    seed=st.integers(0, 2**63),
    round_=st.integers(0, 2),
)
def test_a_round_reads_each_sample_as_often_as_its_source_is_repeated(sources, seed, round_):
    sizes, times = zip(*sources, strict=True)
    order = Order(sizes, times, seed, repeat=True)
    length = sum(size * often for size, often in sources)
    assert order.block == length
    places = [order.at(round_ * length + n) for n in range(length)]
    assert Counter((p.source, p.number) for p in places) == {
        (source, number): often for source, (size, often) in enumerate(sources) for number in range(size)
    }
    for source, often in enumerate(times):  # a sample comes again only when all of its source have been read
        epochs = [p.epoch for p in places if p.source == source]
        assert epochs == sorted(epochs) and set(epochs) == set(range(round_ * often, (round_ + 1) * often))


def test_rounds_differ_and_sources_are_mixed():
    order = Order([20, 30], [3, 1], 0, repeat=True)
    first, second = ([order.at(r * 90 + n)[:2] for n in range(90)] for r in (0, 1))
    assert first != second
    assert 20 < sum(source == 0 for source, _ in first[:45]) < 40  # of 60


def test_repeats_are_whole():
    with pytest.raises(DataError, match=r"repeat: expected whole numbers, found \[1.5\]"):
        Order([3], [1.5], 0, repeat=True)


def sample(key: str) -> Sample:
    return Sample(key, (Message("user", (Part("text", key),)),))


def prepare(sample, draw) -> Example:
    return Example(sample.key, [1], [0.0], torch.zeros(0, 3, 2, 2), position=draw.position)


def stream(stores, weights, state=None, start=0, repeat=False) -> SampleStream:
    config = StreamConfig(4, 4, 1, 0, 0, 3, 20)
    put_together = functools.partial(collate, pad_id=0)
    return SampleStream(stores, weights, config, prepare, put_together, state, start, repeat=repeat)


@pytest.fixture
def folders(tmp_path):
    for name, size in {"a": 9, "b": 5, "c": 5}.items():
        write_shards((sample(f"{name}{n}") for n in range(size)), tmp_path / name)
    return tmp_path


def stores_of(folders, *names):
    return [Store(load_manifest(folders / name)) for name in names]


def test_a_stage_of_repeats_streams_its_round_and_resumes_in_it(folders):
    stores = stores_of(folders, "a", "b")
    items = list(stream(stores, [2, 1], repeat=True))
    ids = [key for item in items for key in item.ids]
    assert Counter(ids[:23]) == {f"a{n}": 2 for n in range(9)} | {f"b{n}": 1 for n in range(5)}
    rest = stream(stores, [2, 1], merge_states([items[2].state]), 3, repeat=True)
    assert [key for item in rest for key in item.ids] == ids[12:]


@pytest.mark.parametrize(
    ("names", "weights", "repeat"),
    [
        (("a", "b"), [2, 2], True),
        (("a", "b"), [2, 1], False),
        (("b", "a"), [2, 1], True),
        (("a", "c"), [2, 1], True),
        (("a",), [2], True),
    ],
)
def test_a_state_of_another_mixture_is_refused(folders, names, weights, repeat):
    state = merge_states([next(iter(stream(stores_of(folders, "a", "b"), [2, 1], repeat=True))).state])
    with pytest.raises(DataError, match=r"^state: expected order \w+ \(data, .*, found \w+: it was saved over other"):
        stream(stores_of(folders, *names), weights, state, 1, repeat)


def test_changed_shards_are_refused(folders):
    """A shard that grew no longer fits its index; indexed anew, it is other data than the state's."""
    state = merge_states([next(iter(stream(stores_of(folders, "a"), [1]))).state])
    [shard] = (folders / "a").glob("*.tar")
    [other] = (folders / "b").glob("*.tar")
    shard.write_bytes(other.read_bytes() + bytes(10240))
    with pytest.raises(DataError, match=r"stale index: expected \d+ bytes, found \d+"):
        stores_of(folders, "a")
    build_index(folders / "a")
    with pytest.raises(DataError, match="it was saved over other data"):
        stream(stores_of(folders, "a"), [1], state, 1)
