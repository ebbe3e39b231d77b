"""The load-balance loss of mixture-of-heads attention against its formula restated, and who is asked for it."""

import pytest
import torch

from vlm.models.backbones.moh import Moh, MohNet
from vlm.models.errors import ModelError

CONFIG = {
    "dims": (12, 24, 48, 96),
    "depths": (1, 1, 2, 1),
    "shared": (2, 1, 2, 3),
    "routed": (0, 1, 3, 4),
    "head_dim": 6,
}  # heads 2, 4, 8, 16


def encoder(layer=-1, **options):
    torch.manual_seed(0)
    return Moh("base_75", layer=layer, image=64, config=CONFIG, **options)


def restated(block, x):
    """mean_e(mean_n p_e * mean_n mask_e) E^2, place by place and head by head in fp64."""
    scores = x.double() @ block.wg.weight.double().T  # [N,L,E]
    share, used, heads = 0.0, 0.0, scores.shape[2]
    for row in scores.flatten(0, 1):
        p = row.exp() / row.exp().sum()
        mask = torch.zeros(heads, dtype=torch.float64)
        mask[p.argsort(descending=True)[: block.routed]] = 1
        share, used = share + p, used + mask
    places = scores.shape[0] * scores.shape[1]
    return (share / places * used / places).mean() * heads**2


def test_the_balance_of_every_routed_layer_is_that_of_the_paper():
    moh, seen = encoder(), []
    routers = [module for module in moh.modules() if hasattr(module, "wg")]
    for module in routers:
        module.wg.weight.data.mul_(100)  # so that heads are used unevenly
        module.wg.register_forward_hook(lambda wg, args, out: seen.append(args[0].detach()))
    with moh.auxiliary() as terms:
        moh(torch.randn(2, 3, 64, 64))
    share, values = terms["balance"]
    assert share == 0.01 and len(values) == len(routers) == 4
    for module, x, value in zip(routers, seen, values, strict=True):
        torch.testing.assert_close(value.double(), restated(module, x), rtol=1e-5, atol=0)
    assert any(value > 1.02 * module.routed for module, value in zip(routers, values, strict=True))


def test_a_router_that_uses_all_heads_alike_has_the_balance_of_so_many_heads():
    net = MohNet(**CONFIG)
    with net.balancing() as found:
        net(torch.randn(1, 3, 64, 64))
    for value, least in zip(found, (1, 3, 3, 4), strict=True):
        assert value.item() == pytest.approx(least, rel=0.1) and value.requires_grad
    net(torch.randn(1, 3, 64, 64))
    with net.balancing() as others, torch.no_grad():
        net(torch.randn(1, 3, 64, 64))
    assert len(found) == 4 and not others  # outside, and where nothing trains, nothing is noted


def test_descending_the_balance_evens_out_the_use_of_heads():
    moh, images = encoder(), torch.randn(4, 3, 64, 64)
    weights = [module.wg.weight for module in moh.modules() if hasattr(module, "wg")]
    for weight in weights:  # only heads at the two ends are chosen
        weight.data = torch.linspace(-1, 1, len(weight))[:, None] * torch.randn(weight.shape[1])
    course = []
    for _ in range(30):
        with moh.auxiliary() as terms:
            moh(images)
        loss = torch.stack(terms["balance"].values).mean()
        course.append(loss.item())
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data.sub_(gradient / gradient.norm(), alpha=0.3)
    assert min(course[-5:]) < 0.9 * course[0]


def test_a_share_that_is_none():
    with encoder(balance=0).auxiliary() as terms:
        assert terms == {}
    with pytest.raises(ModelError, match=r"^model.vision.balance: expected a share of 0 or more; found -1"):
        encoder(balance=-1)
