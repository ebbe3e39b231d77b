"""Visual query tuning against a block written out, and what it must leave alone."""

import pytest
import torch

from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.errors import ModelError
from vlm.models.head import unit
from vlm.models.heads.vqt import Vqt


def build(class_token: bool = True):
    torch.manual_seed(0)
    encoder = ConvVit(48, dim=16, depth=3, heads=2, class_token=class_token)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    head = Vqt(queries=2).build(encoder, 5)
    return encoder.double().eval(), head.double().eval(), torch.randn(2, 3, 48, 48).double()


def through(block, queries, tokens):
    """The block for queries alone, their keys and values those of the tokens."""
    q, _, _ = block.attn.qkv(block.norm1(queries)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    _, k, v = block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) * 8**-0.5).softmax(-1)
    x = queries + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


@torch.no_grad()
def test_queries_read_every_block_as_it_is():
    encoder, head, images = build()
    entering = []
    handles = [b.register_forward_pre_hook(lambda block, args: entering.append(args[0])) for b in encoder.blocks]
    plain = encoder(images)
    for handle in handles:
        handle.remove()
    found, read = head.read(encoder, images)
    assert torch.equal(found.tokens, plain.tokens)  # to the bit
    dense = [
        through(block, queries.expand(2, -1, -1), tokens)
        for block, queries, tokens in zip(encoder.blocks, head.queries, entering, strict=True)
    ]
    torch.testing.assert_close(read, dense)
    vectors = torch.cat([unit(plain.prefix[:, 0]), *(unit(one.flatten(1)) for one in dense)], 1)
    torch.testing.assert_close(head(encoder, images), head.linear(vectors))
    assert not any(block._forward_hooks for block in encoder.blocks)


def test_a_frozen_encoder_keeps_nothing_for_the_gradient():
    encoder, head, images = build()
    encoder.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        head(encoder, images).square().sum().backward()
    assert head.queries.grad.abs().sum((1, 2)).gt(0).all()
    # Keys and values of the patches must stay; nothing else of 37 rows does: no MLP, no norm, no projection of them.
    rows = [shape for shape in kept if len(shape) == 3 and shape[1] == 37]
    assert not rows


def test_encoders_without_what_it_reads_are_refused():
    encoder, head, images = build(class_token=False)
    assert head(encoder, images).shape == (2, 5)  # the mean token stands in for the class token
    for block in encoder.blocks:
        block.attn.fused_attn = False
    with pytest.raises(ModelError, match="expected fused attention"):
        head(encoder, images)
    with pytest.raises(ModelError, match="queries of 1 or more"):
        Vqt(queries=0).build(encoder, 5)
