"""Every form of a visibility against a loop over all pairs; every bad argument is named."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.kernels.visibility import Operands, operands, visibility

KINDS = ("full", "q_len", "k_len", "hidden", "positions", "documents")
sizes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7))
some_kinds = st.lists(st.sampled_from(KINDS), unique=True).map(tuple)


def of(common: dict[str, Any], batch: int, rows: int, keys: int):
    return visibility("op", batch, rows, keys, torch.device("cpu"), common)


@settings(deadline=None, max_examples=150)
@given(sizes, some_kinds, st.integers(0, 10_000))
def test_every_form_is_the_loop_over_pairs(draw_common, sees, size, kinds, seed):
    batch, rows, keys = size
    common = draw_common(seed, *size, kinds)
    expected, seen = sees(common, *size), of(common, *size)

    mask = seen.mask().expand(batch, 1, rows, keys)[:, 0]
    assert torch.equal(mask, expected)
    assert torch.equal(seen.mask(slice(1, 4)).expand(batch, 1, -1, keys)[:, 0], expected[:, 1:4])

    row_position, key_position, row_document, key_document = seen.codes(batch)
    assert {x.dtype for x in seen.codes(batch)} == {torch.int32}
    assert all(x.is_contiguous() for x in seen.codes(batch))
    by_codes = row_document[:, :, None] == key_document[:, None, :]
    if seen.causal:
        by_codes &= key_position[:, None, :] <= row_position[:, :, None]
    assert torch.equal(by_codes, expected)

    b, i, j = (torch.arange(n) for n in size)
    by_function = seen.mask_mod(batch)(b[:, None, None], torch.tensor(0), i[None, :, None], j[None, None, :])
    assert torch.equal(by_function, expected)

    assert torch.equal(seen.count().expand(batch, rows), expected.sum(-1))
    regardless = sees(common | {"causal": False}, *size).sum(-1)
    assert torch.equal(seen.count(causal=False).expand(batch, rows), regardless)


@settings(deadline=None, max_examples=60)
@given(sizes, some_kinds, st.integers(0, 10_000))
def test_picked_rows_see_what_they_saw(draw_common, sees, size, kinds, seed):
    batch, rows, keys = size
    common = draw_common(seed, *size, kinds)
    expected = sees(common, *size)
    chosen = torch.randint(-1, rows, (batch, 5), generator=torch.Generator().manual_seed(seed))
    got = of(common, *size).pick(chosen).mask().expand(batch, 1, 5, keys)[:, 0]
    for b in range(batch):
        for place, row in enumerate(chosen[b].tolist()):
            assert torch.equal(got[b, place], expected[b, row] if row >= 0 else torch.zeros(keys, dtype=torch.bool))
    again = of(common, *size).pick(chosen).pick(torch.tensor([[4, -1]]).expand(batch, 2))
    assert torch.equal(again.mask().expand(batch, 1, 2, keys)[:, 0, 0], got[:, 4])
    assert not again.mask()[:, 0, 1].any()


def test_two_sequences_end_together():
    seen = of({}, 1, 2, 4)
    assert seen.by_index
    assert seen.mask()[0, 0].tolist() == [[True, True, True, False], [True] * 4]
    padded = of({"q_len": torch.tensor([1]), "k_len": torch.tensor([3])}, 1, 2, 4)
    assert padded.mask()[0, 0].tolist() == [[True, True, True, False], [False] * 4]


def test_no_keys():
    seen = of({"k_len": torch.tensor([0, 0])}, 2, 3, 0)
    assert seen.mask().shape == (2, 1, 3, 0)
    assert seen.count().tolist() == [[0, 0, 0]] * 2


def test_uneven_heads_and_scores():
    q, k = torch.randn(1, 3, 2, 4), torch.randn(1, 2, 5, 4)
    head_of = torch.tensor([1, 0, 1])
    x = operands("op", q, k, None, {"kv_head_of": head_of, "causal": False, "scale": 0.25})
    for head, of_head in enumerate(head_of.tolist()):
        torch.testing.assert_close(x.scores()[0, head], 0.25 * q[0, head] @ k[0, of_head].T)
        assert torch.equal(x.per_head(k)[0, head], k[0, of_head])
    assert x.head_map().dtype == torch.int32
    even = operands("op", torch.zeros(1, 6, 2, 4), k, None, {})
    assert even.head_map().tolist() == [0, 0, 0, 1, 1, 1]
    assert even.scale == 0.5


def test_low_precision_scores_are_products_in_fp32():
    q, k = torch.randn(2, 1, 2, 8, 64).bfloat16()
    scores = operands("op", q, k, None, {"causal": False}).scores()
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), q.double() @ k.double().mT / 8, rtol=1e-6, atol=1e-6)


def test_values_are_not_looked_at_without_validate():
    q, k = torch.zeros(2, 2, 3, 4), torch.zeros(2, 1, 5, 4)
    wrong: dict[str, Any] = {"q_len": torch.tensor([9, 9]), "k_len": torch.tensor([-1, 9])}
    wrong |= {"kv_head_of": torch.tensor([7, 7]), "q_doc": torch.full((2, 3), -5), "k_doc": torch.full((2, 5), -5)}
    with pytest.raises(ValueError, match=r"kv_head_of must be 0\.\.0; found 7\.\.7"):
        operands("op", q, k, None, wrong)
    assert isinstance(operands("op", q, k, None, wrong | {"validate": False}), Operands)
    with pytest.raises(ValueError, match="q_len must be integer; found torch"):
        operands("op", q, k, None, {"q_len": torch.zeros(2), "validate": False})


BAD = {
    "q of three dimensions": ({"q": torch.zeros(2, 3, 8)}, "q must be .batch, heads, length, dim.; found shape"),
    "integer q": ({"q": torch.zeros(2, 4, 3, 8, dtype=torch.long)}, "q must be floating"),
    "k of another type": ({"k": torch.zeros(2, 2, 5, 8).double()}, "k must be .*float32; found torch.float64"),
    "k on another device": ({"k": torch.zeros(2, 2, 5, 8, device="meta")}, "k must be on .* cpu; found meta"),
    "another batch": ({"q": torch.zeros(1, 4, 3, 8)}, "q and k must share batch and dim"),
    "v of another length": ({"v": torch.zeros(2, 2, 6, 8)}, "v must share batch, heads and keys with k"),
    "uneven heads": ({"q": torch.zeros(2, 3, 3, 8)}, "query heads must be a multiple of key heads .* found 3, 2"),
    "head map shape": ({"kv_head_of": torch.zeros(3, dtype=torch.long)}, r"kv_head_of must have shape \(4,\)"),
    "head map value": ({"kv_head_of": torch.tensor([0, 1, 2, 0])}, r"kv_head_of must be 0\.\.1; found 0\.\.2"),
    "scale": ({"scale": float("nan")}, "scale must be finite; found nan"),
    "key_valid shape": ({"key_valid": torch.ones(2, 3).bool()}, r"key_valid must have shape \(2, 5\); found \(2, 3\)"),
    "key_valid type": ({"key_valid": torch.ones(2, 5)}, "key_valid must be bool; found torch.float32"),
    "q_len shape": ({"q_len": torch.ones(3).long()}, r"q_len must have shape \(2,\)"),
    "q_len value": ({"q_len": torch.tensor([1, 4])}, r"q_len must be 0\.\.3; found 1\.\.4"),
    "k_len value": ({"k_len": torch.tensor([-1, 4])}, r"k_len must be 0\.\.5; found -1\.\.4"),
    "k_len type": ({"k_len": torch.ones(2)}, "k_len must be integer; found torch.float32"),
    "k_len device": ({"k_len": torch.ones(2, device="meta").long()}, "k_len must be on cpu; found meta"),
    "q_pos alone": ({"q_pos": torch.zeros(2, 3).long()}, "q_pos was given without k_pos"),
    "k_doc alone": ({"k_doc": torch.zeros(2, 5).long()}, "k_doc was given without q_doc"),
    "k_pos shape": (
        {"q_pos": torch.zeros(2, 3).long(), "k_pos": torch.zeros(2, 3).long()},
        r"k_pos must have shape \(2, 5\)",
    ),
    "q_pos type": ({"q_pos": torch.zeros(2, 3), "k_pos": torch.zeros(2, 5)}, "q_pos must be integer"),
    "q_doc value": (
        {"q_doc": torch.full((2, 3), -1), "k_doc": torch.zeros(2, 5).long()},
        r"q_doc must be 0 or more; found -1\.\.-1",
    ),
}


@pytest.mark.bad_shape
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    change, message = BAD[case]
    good = {"q": torch.zeros(2, 4, 3, 8), "k": torch.zeros(2, 2, 5, 8), "v": torch.zeros(2, 2, 5, 8)} | change
    with pytest.raises(ValueError, match=f"op: {message}"):
        operands("op", good.pop("q"), good.pop("k"), good.pop("v"), good)  # type: ignore[arg-type]


def test_an_unknown_keyword_is_named():
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(TypeError, match="op: unknown keyword 'mask'; the common keywords are causal, q_len"):
        operands("op", q, q, q, {"mask": None})  # type: ignore[typeddict-unknown-key]
