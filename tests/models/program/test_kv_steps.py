"""Which entries a decoding step reads."""

import torch

from vlm.models.program.kv_steps import is_full_step, query_moved, read_by, recycled, step_set


def test_layers_read_what_the_last_focal_layer_chose():
    focal = (3, 7)
    assert [read_by(layer, focal, 0) for layer in (0, 2, 3, 5, 7, 9)] == [None, None, None, (3, 0), None, (7, 0)]
    assert [read_by(layer, focal, 4) for layer in (0, 2, 3, 5, 7, 9)] == [(7, 3), (7, 3), None, (3, 4), None, (7, 4)]
    assert read_by(0, (), 4) is None


def test_a_step_set_is_the_visual_entries_that_get_most():
    attention, visual = torch.rand(2, 3, 50), torch.zeros(2, 50, dtype=torch.bool)
    visual[0, 5:45] = visual[1, 10:31] = True
    chosen = step_set(attention, visual, torch.tensor([2, 3]))
    assert chosen.sum(1).tolist() == [2, 3]
    assert not (chosen & ~visual).any()
    best = attention[0].mean(0)[5:45].topk(2).indices + 5
    assert sorted(best.tolist()) == chosen[0].nonzero().flatten().tolist()


def test_full_steps_come_at_a_stride_or_when_the_query_moved():
    assert [step for step in range(101) if is_full_step(step, 50)] == [0, 50, 100]
    query = torch.eye(4)[None, :2]
    moved = query_moved(torch.cat([query, query.flip(1)]), torch.cat([query, query]))
    assert moved.tolist() == [False, True]


def test_a_recycled_set_is_the_best_of_each_head():
    attention, valid = torch.rand(1, 2, 9), torch.ones(1, 9, dtype=torch.bool)
    chosen = recycled(attention, valid, 4)
    assert chosen.sum(2).tolist() == [[4, 4]]
    for h in range(2):
        assert sorted(attention[0, h].topk(4).indices.tolist()) == chosen[0, h].nonzero().flatten().tolist()
