"""The smallest keys stay."""

from vlm.models.kv.l2norm import L2norm
from vlm.models.program.budget import Budget


def test_the_smallest_keys_stay(make_model, batch, dense, kept, best):
    model, inputs = make_model(), batch("tt#ttt", "t#t#tt")
    for b, n in enumerate((41, 76)):
        found = kept(model, inputs, L2norm(Budget.parse("25%"), skip=1), b)
        assert found[0] == [list(range(n))] * 2
        for number, layer in enumerate(dense(model, inputs, b)):
            if number:
                for h in range(2):
                    assert found[number][h] == best(-layer.k[h].norm(dim=1), range(n), round(n / 4))
