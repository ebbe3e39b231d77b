"""GUI-KV against its procedure on dense attention, with learned gains before attention and a small rank."""

import pytest
import torch

from vlm.models.kv.guikv import Guikv
from vlm.models.program.budget import Budget


def with_gains(model):
    for layer in model.decoder.layers:
        torch.nn.init.uniform_(layer.input_layernorm.weight, 0.1, 2)
    return model


@pytest.mark.parametrize(("row", "n"), [("tt#ttt", 41), ("t#t#tt", 76), ("t#t#t#t", 112), ("tttttttttttt", 12)])
def test_the_choice(make_model, batch, dense, kept, best, smooth, image_places, row, n):
    model, inputs = with_gains(make_model()), batch(row, "ttttt#tttttt")
    method = Guikv(Budget.parse("25%"), rank=3)
    capacity = round(n / 4)
    window = min(8, max(capacity // 2, 1))
    image, found = image_places(model, inputs), kept(model, inputs, method)
    newest = int(image.max())
    latest = (image == newest).nonzero().flatten() if newest >= 0 else torch.empty(0, dtype=torch.long)
    older = ((image >= 0) & (image < newest)).nonzero().flatten().tolist()
    for number, layer in enumerate(dense(model, inputs)):
        paid = layer.paid(slice(n - window, n))
        norm = layer.normed.norm(dim=1)[latest]
        bonus = 2 * ((norm - norm.mean()) / norm.std() / 3.5).softmax(0) if len(norm) else norm
        for h in range(2):
            score = torch.tensor(smooth(paid[h], n - window, 5) + [0.0] * window, dtype=torch.double)
            score[latest] += bonus
            basis = torch.linalg.qr(layer.k[h][latest[:3]].T)[0]
            rest = (layer.k[h] - layer.k[h] @ basis @ basis.T).norm(dim=1)
            said_again = sorted(older, key=lambda t, r=rest: float(r[t]))[: int(len(older) * (1 - capacity / n))]
            score[said_again] = 0
            mine = best(score, range(n - window), capacity - window)
            assert found[number][h] == [*mine, *range(n - window, n)]


def test_what_the_latest_image_repeats_goes(make_model, batch, kept, image_places):
    # twice the same picture, whose tokens have the same keys but for their rotation
    model, inputs = make_model(), batch("t#t#t")
    same = inputs._replace(images=inputs.images[:1].expand(2, -1, -1, -1))
    first, second = (image_places(model, same) == image for image in (0, 1))
    counts = torch.zeros(2)
    for layer in kept(model, same, Guikv(Budget.parse("30%"), rank=4)):
        for head in layer:
            counts += torch.tensor([first[head].sum(), second[head].sum()])
    assert counts[0] < 0.5 * counts[1]
