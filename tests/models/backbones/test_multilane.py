"""MULTI-LANE's lane against its blocks written out in matrices."""

import pytest
import torch
from torch.nn import functional as F

from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.backbones.multilane import Multilane
from vlm.models.errors import ModelError


def build(**options: int) -> Multilane:
    torch.manual_seed(0)
    encoder = ConvVit(48, dim=16, depth=3, heads=2, class_token=True)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Multilane(encoder, selectors=5, **options).double().eval()


def attend(block, x, prompt):
    """timm's block in matrices, with keys and values before its own."""
    heads, width = 2, x.shape[2]
    normed = block.norm1(x)
    q, k, v = (block.attn.qkv(normed)).unflatten(2, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
    if prompt is not None:
        own = prompt.unflatten(2, (heads, -1)).transpose(1, 2)  # [2,H,prompts,d]
        k, v = (torch.cat([p.expand(len(x), -1, -1, -1), s], 2) for p, s in zip(own, (k, v), strict=True))
    weights = (q @ k.transpose(2, 3) * (width // heads) ** -0.5).softmax(-1)
    x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("prompted", [0, 2, 9])
def test_the_lane_equals_its_blocks_in_matrices(prompted):
    lane = build(prompts=3, prompted=prompted)
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    trunk = lane.encoder.model
    with torch.no_grad():
        x = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(images)))
        cls = x[:, :1]
        for number, block in enumerate(trunk.blocks):
            patches = x[:, 1:]
            choice = F.softmax(lane.selectors @ patches.transpose(1, 2) / 16**0.5, -1)
            prompt = lane.prompts[number] if number < prompted else None
            z = attend(block, torch.cat([cls, choice @ patches], 1), prompt)
            cls, x = z[:, :1], attend(block, x, None)
        found = lane(images)
    assert found.grid == (1, 5) and found.tokens.shape == (2, 5, 16)
    torch.testing.assert_close(found.tokens, z[:, 1:], rtol=0, atol=1e-10)
    torch.testing.assert_close(found.prefix, cls, rtol=0, atol=1e-10)


def test_only_selectors_and_prompts_train():
    lane = build(prompts=3, prompted=2).train()
    lane(torch.randn(1, 3, 48, 48, dtype=torch.float64)).tokens.square().sum().backward()
    touched = {name for name, parameter in lane.named_parameters() if parameter.grad is not None}
    assert touched == {"selectors", "prompts"}
    assert all(parameter.grad.abs().sum() > 0 for parameter in (lane.selectors, lane.prompts))


def test_an_encoder_without_a_class_token_is_refused():
    with pytest.raises(ModelError, match="multilane: expected an encoder of attention blocks with a class token"):
        Multilane(ConvVit(48, dim=16, depth=1, heads=2))


def test_it_is_the_encoder_of_a_composed_model(make_model, batch):
    from vlm.models.connectors.mlp import Mlp
    from vlm.models.vision_language import VisionLanguageModel

    whole = make_model()
    model = VisionLanguageModel(build(prompts=2), Mlp(16, 32).double(), whole.language).double()
    inputs = batch("tt#ttt", "t#t#")
    assert model(inputs).layout.visual.sum(1).tolist() == [5, 10]
    model.parts["vision"].requires_grad_(True)
    assert [p.requires_grad for p in model.vision.encoder.parameters()] == [False] * len(
        list(model.vision.encoder.parameters())
    )
    assert model.vision.selectors.requires_grad
