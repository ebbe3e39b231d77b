"""Grouped heads: what conversion keeps, how query heads are shared out."""

import pytest
import timm
import torch

from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.backbones.grouped_vit import GroupedAttention, GroupedVit, key_norms, shares
from vlm.models.errors import ModelError


def build(**options):
    torch.manual_seed(0)
    return ConvVit(48, dim=32, depth=2, heads=4, **options).eval()


@torch.no_grad()
def test_as_many_groups_as_heads_is_the_same_model():
    encoder, images = build(), torch.randn(2, 3, 48, 48)
    before = encoder(images).tokens
    grouped = GroupedVit(encoder, groups=4, grouping="gqa").eval()
    torch.testing.assert_close(grouped(images).tokens, before)
    assert (grouped.dim, grouped.grid, len(grouped.blocks)) == (32, (6, 6), 2)


@torch.no_grad()
def test_a_group_has_the_mean_of_its_heads_keys():
    encoder = build()
    k = encoder.blocks[0].attn.qkv.weight.unflatten(0, (3, 4, 8))[1].clone()  # [H,d,D]
    grouped = GroupedVit(encoder, groups=2)
    found = grouped.blocks[0].attn.k.weight.unflatten(0, (2, 8))
    torch.testing.assert_close(found[1], (k[2] + k[3]) / 2)


def test_shares_are_rounded_and_repaired():
    assert shares(torch.tensor([0.0, 0.5, 1.0]), 12).tolist() == [0, 4, 8]
    assert shares(torch.ones(5), 12).tolist() == [3, 3, 2, 2, 2]  # 2.4 each is 2; the smallest take
    assert shares(torch.tensor([0.5, 0.5, 1.0]), 6).tolist() == [2, 2, 2]  # 1.5 is 2 (to even), 3 gives one
    assert shares(torch.zeros(4), 8).tolist() == [2, 2, 2, 2]


@torch.no_grad()
def test_equal_keys_are_plain_groups():
    torch.manual_seed(0)
    by_key, plain = GroupedAttention(32, 8, 4, "kdgqa"), GroupedAttention(32, 8, 4, "gqa")
    for layer in (by_key.k, by_key.v):  # every group alike
        layer.weight.copy_(layer.weight[:4].repeat(4, 1))
        layer.bias.copy_(layer.bias[:4].repeat(4))
    plain.load_state_dict(by_key.state_dict())
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(by_key(x), plain(x))
    assert key_norms(by_key.k(x).unflatten(2, (4, 4)).transpose(1, 2)).tolist() == [1.0] * 4


def test_dynamic_groups_change_in_training_alone_and_are_saved():
    torch.manual_seed(0)
    attention, x = GroupedAttention(32, 8, 4, "dgqa_ema", window=2), torch.randn(2, 7, 32)
    attention.eval()(x)
    assert attention.sizes.tolist() == [2, 2, 2, 2]
    attention.train()(x)
    attention(x)
    changed = attention.sizes.tolist()
    assert sum(changed) == 8 and changed != [2, 2, 2, 2]
    again = GroupedAttention(32, 8, 4, "dgqa_ema")
    again.load_state_dict(attention.state_dict())
    assert again.sizes.tolist() == changed
    again.load_state_dict({k: v for k, v in attention.state_dict().items() if k != "sizes"})  # as published
    assert again.sizes.tolist() == [2, 2, 2, 2]


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(ModelError, match="groups that divide the 4 heads; found 3"):
        GroupedVit(build(), groups=3)
    with pytest.raises(ModelError, match="expected one of gqa"):
        GroupedVit(build(), grouping="kdqga")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="plain vision transformer"):
        GroupedVit(GroupedVit(build()))
    vit = timm.create_model("vit_tiny_patch16_224", qk_norm=True, depth=1)
    from vlm.models.backbones.grouped_vit import group_attention

    with pytest.raises(ModelError, match="without norms of q, k; found Attention"):
        group_attention(vit)
