"""Layouts under cuts and growth, against lists."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm.models.program.layout import IMAGE, PAD, TEXT, Layout, compact


def layout_of(role: list[list[int]]) -> Layout:
    """A layout whose every token can be told apart by its source."""
    roles = torch.tensor(role)
    place = torch.arange(roles.shape[1]).expand(roles.shape)
    image = torch.where(roles == IMAGE, 0, -1)
    row = torch.arange(len(role))[:, None].expand(roles.shape)
    return Layout(roles, image, image, image, place * 10, row, place)


ROWS = st.integers(1, 7).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=4)
)


@given(ROWS, st.sampled_from(["left", "right"]))
def test_compact_gathers_the_kept_places_in_order(keep, side):
    index, real = compact(torch.tensor(keep), side)
    longest = max(sum(row) for row in keep)
    assert index.shape == real.shape == (len(keep), longest)
    for b, row in enumerate(keep):
        kept = [place for place, stays in enumerate(row) if stays]
        assert index[b][real[b]].tolist() == kept
        padding = [False] * (longest - len(kept))
        assert real[b].tolist() == (padding + [True] * len(kept) if side == "left" else [True] * len(kept) + padding)


@given(ROWS, st.sampled_from(["left", "right"]))
def test_a_cut_keeps_what_stands_at_the_kept_places(keep, side):
    layout = layout_of([[TEXT, IMAGE, IMAGE, TEXT, IMAGE, TEXT, TEXT][: len(row)] for row in keep])
    cut = layout.take(*compact(torch.tensor(keep), side))
    for b, row in enumerate(keep):
        kept = [place for place, stays in enumerate(row) if stays]
        valid = cut.valid[b]
        assert cut.source[b, valid].tolist() == kept
        assert cut.position[b, valid].tolist() == [10 * place for place in kept]
        assert cut.reindexed().position[b, valid].tolist() == list(range(len(kept)))
        assert cut.role[b, valid].tolist() == layout.role[b, kept].tolist()
        assert (cut.image[b, ~valid] == -1).all() and not cut.visual[b, ~valid].any()


def test_generated_tokens_follow_the_last_position_of_each_row():
    layout = layout_of([[PAD, TEXT, IMAGE], [TEXT, TEXT, PAD]]).append(2)
    assert layout.position[:, 3:].tolist() == [[21, 22], [11, 12]]
    assert layout.role[:, 3:].tolist() == [[TEXT, TEXT]] * 2
    assert layout.sample[:, 3:].tolist() == [[0, 0], [1, 1]]
    assert layout.append().position[:, -1].tolist() == [23, 13]


def test_last_place_of_a_mask():
    layout = layout_of([[PAD, TEXT, IMAGE, TEXT], [TEXT, TEXT, TEXT, PAD]])
    assert layout.last(layout.visual).tolist() == [2, -1]
    assert layout.last(layout.valid).tolist() == [3, 2]
