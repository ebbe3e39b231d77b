"""A predicted mask: what it keeps, and that keeping everything is a plain DeiT."""

import pytest
import timm
import torch

from vlm.models.backbones.sparsifiner import MaskPredictor, Sparsifiner
from vlm.models.encoder import unread
from vlm.models.errors import ModelError

SMALL = {"dim": 24, "heads": 3, "depth": 2, "size": 64, "classes": 7}


@torch.no_grad()
def test_keeping_every_key_is_deit():
    ours = Sparsifiner.network(**SMALL, keep=1.0).eval()
    plain = timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=24, depth=2, num_heads=3, num_classes=7
    ).eval()
    state = {key: torch.randn_like(value) * 0.2 for key, value in plain.state_dict().items()}
    plain.load_state_dict(state)
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and all(".mask_predictor." in key for key in missing)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), plain(images))


@torch.no_grad()
def test_a_mask_is_the_largest_of_a_product_of_few():
    torch.manual_seed(0)
    predictor = MaskPredictor(25, 8, 6, 2, 0.25, 3)  # rank 4
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    q, k = torch.randn(2, 3, 25, 8), torch.randn(2, 3, 25, 8)
    found = predictor(q, k)
    assert found.mask.shape == (2, 3, 25, 25) and found.mask[:, :, 0].all()
    assert (found.mask[:, :, 1:].sum(3) == 7).all()  # a quarter of 25, rounded up
    assert ((found.coefficients > 0).sum(3) == 3).all()
    kept = torch.where(found.mask[:, :, 1:], found.approximate, torch.inf).amin(3)
    dropped = torch.where(found.mask[:, :, 1:], -torch.inf, found.approximate).amax(3)
    assert (kept >= dropped).all()
    basis = predictor.proj_back_n.abs()
    basis[basis <= 0.02] = 0.0
    torch.testing.assert_close(found.approximate, found.coefficients @ basis.T)


def test_it_takes_one_size_and_keeps_its_predictors_without_their_gradient():
    encoder = Sparsifiner("s", layer=0, image=64, config=SMALL).eval()
    assert (encoder.dim, encoder.grid) == (24, (4, 4))
    assert list(encoder.model.blocks[0].parameters()) and not list(encoder.model.blocks[1].parameters())
    features = encoder(torch.randn(2, 3, 64, 64))
    assert features.tokens.shape == (2, 16, 24) and features.prefix.shape == (2, 1, 24)
    features.tokens.square().sum().backward()
    assert all(p.grad is None for n, p in encoder.named_parameters() if "mask_predictor" in n)
    with pytest.raises(ModelError, match=r"expected images of 64 x 64 pixels, .* found 96 x 64"):
        encoder(torch.randn(1, 3, 96, 64))
    with pytest.raises(ModelError, match="multiples of 16 pixels; found 65"):
        Sparsifiner.network(**(SMALL | {"size": 65}))


def test_the_predictor_learns_the_attention_by_its_own_loss():
    """The loss against its formula restated head by head, who gets a gradient, and that it falls."""
    torch.manual_seed(0)
    encoder = Sparsifiner("s", layer=-1, image=64, config=SMALL, reconstruct=0.5)
    assert not [name for name in unread(encoder) if "mask_predictor" in name]
    silent = Sparsifiner("s", layer=-1, image=64, config=SMALL)
    assert len([name for name in unread(silent) if "mask_predictor" in name]) == 2 * 6
    images, seen = torch.randn(3, 3, 64, 64), []
    attention = encoder.model.blocks[0].attn
    handle = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with encoder.auxiliary() as terms:
        encoder(images)
    handle.remove()
    share, values = terms["reconstruction"]
    assert share == 0.5 and len(values) == 2
    q, k, _ = attention.split(seen[0])
    guess = attention.mask_predictor
    total = 0.0
    for n in range(3):
        for h in range(3):
            dense = (q[n, h] @ k[n, h].T / 8**0.5).softmax(-1)[1:]
            few = guess.proj_c_q(q[n, h])[1:] @ (guess.proj_c_k(k[n, h]).T @ guess.proj_n)
            total += ((few / 3**0.5).softmax(-1) @ guess.proj_back_n.T - dense).square().sum() / 3
    torch.testing.assert_close(values[0], total)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.05)
    course = []
    for _ in range(20):
        with encoder.auxiliary() as terms:
            encoder(images)
        loss = torch.stack(terms["reconstruction"].values).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.append(float(loss))
    assert course[-1] < 0.7 * course[0]
    assert all(p.grad is not None for n, p in encoder.named_parameters() if "mask_predictor" in n)
    with silent.auxiliary() as terms:
        assert terms == {}
    with pytest.raises(ModelError, match=r"^model.vision.reconstruct: expected a share of 0 or more; found -1"):
        Sparsifiner("s", reconstruct=-1)
