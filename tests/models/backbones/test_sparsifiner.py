"""A predicted mask: what it keeps, and that keeping everything is a plain DeiT."""

import pytest
import timm
import torch

from vlm.models.backbones.sparsifiner import MaskPredictor, Sparsifiner
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
