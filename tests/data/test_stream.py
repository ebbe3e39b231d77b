"""The stream: one order for every layout, exact resume, whole windows, and bad samples that leave no hole."""

import functools
import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.batch import Example, collate
from vlm.data.draw import Draw
from vlm.data.errors import DataError
from vlm.data.index import build_index
from vlm.data.order import Order
from vlm.data.schema import Message, Part, Sample
from vlm.data.store import Store
from vlm.data.stream import (
    BadSamplePolicy,
    SampleStream,
    State,
    StreamConfig,
    legal_worlds,
    merge_states,
    step_ids,
)
from vlm.data.write import write_shards

GLOBAL, STEPS, SEED = 16, 6, 3


def sample(key: str) -> Sample:
    return Sample(key, (Message("user", (Part("text", key),)),))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    root = tmp_path_factory.mktemp("stores")
    sizes = {"a": 37, "b": 11}
    return [
        Store(write_shards((sample(f"{name}{n}") for n in range(size)), root / name, max_count=10))
        for name, size in sizes.items()
    ]


def prepare(sample: Sample, draw: Draw) -> Example:
    """A stand-in whose loss weights come from the draw, so that they show if luck depends on the layout."""
    return Example(sample.key, [1, 2], [0.0, float(draw.rng.random())], torch.zeros(0, 3, 2, 2), position=draw.position)


def stream(
    stores: list[Store],
    world: int = 1,
    rank: int = 0,
    micro: int = 4,
    workers: int = 0,
    state: State | None = None,
    start: int = 0,
    **options,
) -> SampleStream:
    config = StreamConfig(GLOBAL, micro, world, rank, workers, SEED, STEPS)
    put_together = functools.partial(collate, pad_id=0)
    return SampleStream(stores, [2, 1], config, options.pop("prepare", prepare), put_together, state, start, **options)


def consume(
    stores: list[Store],
    world: int,
    micro: int,
    workers: int,
    state: State | None = None,
    start: int = 0,
    steps: int = STEPS,
) -> tuple[list[list[tuple[str, float]]], State]:
    """What all ranks see of steps start..steps in slot order: (id, its luck); and the merged state after the last."""
    seen: list[list[tuple[list[int], list[tuple[str, float]]]]] = [[] for _ in range(steps - start)]
    states = []
    for rank in range(world):
        last: State = {}
        for item in stream(stores, world, rank, micro, workers, state, start):
            if item.step == steps:
                break
            lucks = item.batch.weights.sum(1).tolist()
            seen[item.step - start].append((item.slots, list(zip(item.ids, lucks, strict=True))))
            last = item.state
        states.append(json.loads(json.dumps(last)))
    by_slot = [dict(pair for slots, ids in step for pair in zip(slots, ids, strict=True)) for step in seen]
    assert all(sorted(step) == list(range(GLOBAL)) for step in by_slot)
    return [[step[slot] for slot in range(GLOBAL)] for step in by_slot], merge_states(states)


@pytest.fixture(scope="module")
def reference(stores: list[Store]) -> list[list[tuple[str, float]]]:
    """By definition: slot k of step s is position k + s B of the order."""
    order = Order([len(store) for store in stores], [2, 1], SEED)
    expected = []
    for position in range(GLOBAL * STEPS):
        place = order.at(position)
        luck = float(torch.tensor(Draw(position, place.epoch, SEED).rng.random(), dtype=torch.float32))
        expected.append((stores[place.source].key(place.number), luck))
    return [expected[step * GLOBAL : (step + 1) * GLOBAL] for step in range(STEPS)]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_order_is_that_of_the_definition_for_every_layout(stores, reference, world: int, micro: int, workers: int):
    assert consume(stores, world, micro, workers)[0] == reference


LAYOUTS = [(1, 4, 0), (2, 2, 1), (4, 1, 0), (1, 1, 2)]


@pytest.mark.parametrize("before", LAYOUTS)
@pytest.mark.parametrize("after", LAYOUTS)
def test_stopping_and_going_on_with_another_layout_is_exact(stores, reference, before, after):
    first, state = consume(stores, *before, steps=2)
    assert json.loads(json.dumps(state)) == state and len(state["slots"]) == GLOBAL
    rest, _ = consume(stores, *after, state=state, start=2)
    assert first + rest == reference


def test_what_was_prefetched_and_not_consumed_was_never_counted(stores, reference):
    items = iter(stream(stores, workers=2))
    one = next(items)
    del items
    again, _ = consume(stores, 2, 2, 0, state=one.state, start=1)
    assert again == reference[1:]


def test_iterating_again_starts_again(stores):
    reader = stream(stores)
    assert [item.ids for item in reader] == [item.ids for item in reader]


@pytest.mark.parametrize(("world", "micro", "start"), [(1, 4, 0), (2, 4, 2), (4, 1, 5), (2, 2, 6), (1, 16, 9)])
def test_the_length_is_the_number_of_micro_batches_left(stores, world: int, micro: int, start: int):
    state = merge_states([after(stores, world, rank, micro) for rank in range(world)])
    reader = stream(stores, world, micro=micro, state=state, start=start)
    assert len(reader) == max(0, STEPS - start) * (GLOBAL // world // micro) == len(list(reader))


def after(stores: list[Store], world: int, rank: int, micro: int) -> State:
    return next(iter(stream(stores, world, rank, micro))).state


def test_windows_end_and_weigh_as_a_whole(stores):
    items = list(stream(stores, world=2, rank=1, micro=2))
    assert [item.last_in_window for item in items] == [False, False, False, True] * STEPS
    assert [item.step for item in items] == [step for step in range(STEPS) for _ in range(4)]
    assert [slot for item in items[:4] for slot in item.slots] == list(range(8, 16))
    for start in range(0, len(items), 4):
        window = items[start : start + 4]
        total = sum(float(item.batch.weights.sum()) for item in window)
        assert [item.window_weight for item in window] == pytest.approx([total] * 4)
        assert all(item.state == window[0].state for item in window)


def test_ids_of_a_step_in_slot_order():
    assert step_ids([([2, 3], ["c", "d"]), ([0, 1], ["a", "b"])]) == ["a", "b", "c", "d"]


@given(st.integers(1, 64), st.integers(1, 16))
def test_legal_worlds_are_all_that_divide(micro: int, micro_batches: int):
    worlds = legal_worlds(micro * micro_batches, micro)
    assert worlds == [world for world in range(1, 2000) if micro * micro_batches % (micro * world) == 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 3, 1, 0, 0, 0, 1), "micro_batch: expected a divisor of 16, found 3"),
        ((16, 4, 3, 0, 0, 0, 1), "expected one of 1, 2, 4, found 3"),
        ((16, 4, 8, 0, 0, 0, 1), "expected one of 1, 2, 4, found 8"),
        ((16, 4, 2, 2, 0, 0, 1), "expected rank 0 to 1"),
        ((16, 4, 2, 0, -1, 0, 1), "workers and steps of at least 0"),
    ],
)
def test_layouts_that_cannot_be_are_refused(arguments: tuple[int, ...], message: str):
    with pytest.raises(DataError, match=message):
        StreamConfig(*arguments)


def test_states_that_do_not_fit_are_refused(stores):
    whole = merge_states([after(stores, 2, rank, 4) for rank in range(2)])
    half = after(stores, 2, 0, 4)
    with pytest.raises(DataError, match="expected all slots of one order, found 7 slots"):
        merge_states([{**half, "slots": {name: half["slots"][name] for name in list(half["slots"])[1:]}}])
    with pytest.raises(DataError, match="slot 0: expected one position"):
        merge_states([half, {**half, "slots": {"0": {"position": 5}}}])
    with pytest.raises(DataError, match="expected 16 slots, one per sample of global_batch, found 8"):
        stream(stores, state=half)
    with pytest.raises(DataError, match="expected version 1, found 2"):
        stream(stores, state={**whole, "version": 2})
    with pytest.raises(DataError, match=r"expected order .* \(data, weights, seed, shuffle, packing\), found"):
        stream(stores[::-1], state=whole)


@pytest.fixture
def damaged(tmp_path: Path) -> list[Store]:
    """40 samples of which number 7 holds json that is not utf-8, and eleven others."""
    write_shards((sample(f"s{n:02d}") for n in range(40)), tmp_path / "bad")
    shard = tmp_path / "bad" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"s07"', b'"s\xff7"'))
    good = Store(write_shards((sample(f"g{n}") for n in range(11)), tmp_path / "good"))
    return [Store(build_index(tmp_path / "bad")), good]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_a_blank_at_its_place(damaged, workers: int, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        items = list(stream(damaged, workers=workers))
    skipped = [(item, key) for item in items for key, _ in item.skipped]
    assert skipped and {key for _, key in skipped} == {"s07"}
    assert caplog.text.count("sample s07: json: expected utf-8, found byte 0xff") == len(skipped)
    for item, key in skipped:
        row = item.ids.index(key)
        assert item.batch.keys[row] == key and item.batch.length[row] == 1 and item.batch.weights[row].sum() == 0
    assert sum(len(item.ids) for item in items) == GLOBAL * STEPS
    order = Order([40, 11], [2, 1], SEED)
    stores = dict(enumerate(damaged))
    expected = [stores[place.source].key(place.number) for place in map(order.at, range(GLOBAL * STEPS))]
    assert [key for item in items for key in item.ids] == expected


def unreadable(sample: Sample, draw: Draw) -> Example:
    if sample.key.startswith("b"):
        raise OSError(5, f"disk error at {sample.key}")
    return prepare(sample, draw)


def every(sample: Sample, draw: Draw) -> Example:
    raise DataError(f"sample {sample.key}: bad")


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_in_a_row_stop_the_run(stores, workers: int):
    reader = stream(stores, workers=workers, prepare=every, tolerance=BadSamplePolicy(5, 1.0, 100))
    with pytest.raises(
        DataError, match=r"bad samples: expected at most 5 in a row, found (\w+, ){5}\w+; the last: sample"
    ):
        list(reader)


def test_a_good_sample_ends_a_row(stores):
    order = Order([len(store) for store in stores], [2, 1], SEED)
    bad = [order.at(position).source == 1 for position in range(GLOBAL * STEPS)]
    longest = max(len(list(run)) for is_bad, run in itertools.groupby(bad) if is_bad)
    assert 1 < longest < sum(bad)
    list(stream(stores, prepare=unreadable, tolerance=BadSamplePolicy(longest, 1.0, 0)))
    with pytest.raises(DataError, match=f"expected at most {longest - 1} in a row"):
        list(stream(stores, prepare=unreadable, tolerance=BadSamplePolicy(longest - 1, 1.0, 0)))


def test_too_large_a_fraction_stops_the_run(stores):
    reader = stream(stores, prepare=unreadable, tolerance=BadSamplePolicy(1000, 0.01, 3))
    with pytest.raises(
        DataError, match=r"expected at most 1.00% \(and 3\), found 4 of \d+: b\d+.*, b\d+; the last: .*disk"
    ):
        list(reader)
    assert len(list(stream(stores, prepare=unreadable, tolerance=BadSamplePolicy(1000, 0.5, 3)))) == 24


def test_an_error_of_ours_is_no_bad_sample(stores):
    def broken(sample: Sample, draw: Draw) -> Example:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(stream(stores, prepare=broken))


def uneven(sample: Sample, draw: Draw) -> Example:
    return Example(sample.key, [1], [0.0], torch.zeros(1, 3, 2, 2 + draw.position % 2), position=draw.position)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_collating_refuses_arrives_as_one_line(stores, workers: int):
    with pytest.raises(DataError, match="image: expected the batch's shape") as caught:
        list(stream(stores, workers=workers, prepare=uneven))
    assert "\n" not in str(caught.value)
