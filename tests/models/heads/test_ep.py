"""Efficient probing as attention pooling; its classifier."""

import pytest
import torch

from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.errors import ModelError
from vlm.models.head import Classifier
from vlm.models.heads.ep import EfficientProbing, Ep
from vlm.models.heads.linear import Linear


def test_one_query_is_attention_pooling():
    pool, x = EfficientProbing(12, 1).double(), torch.randn(2, 9, 12).double()
    weights = (x @ pool.cls_token[0, 0] * 12**-0.5).softmax(1)
    torch.testing.assert_close(pool(x), pool.v((weights[..., None] * x).sum(1)))


def test_each_query_has_channels_of_its_own():
    pool, x = EfficientProbing(12, 3).double(), torch.randn(2, 9, 12).double()
    whole = pool(x)
    with torch.no_grad():
        pool.cls_token[0, 1] = 0.0  # of the second query
    changed = (pool(x) - whole).abs().amax(0) > 1e-12
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    torch.testing.assert_close(pool.groups(x).flatten(1), pool(x))
    torch.testing.assert_close(pool(x)[:, 4:8], pool.v(x.mean(1))[:, 4:8])  # a query of zeros looks everywhere alike


def test_heads_read_an_encoder():
    encoder, images = ConvVit(48, dim=16, depth=1, heads=2, class_token=True), torch.randn(3, 3, 48, 48)
    features = encoder(images)
    probe = Linear().build(encoder, 5).eval()
    torch.testing.assert_close(probe(encoder, images), probe.classifier(features.prefix[:, 0]))
    ep = Ep(queries=4, prefix=True).build(encoder, 5).eval()
    whole = torch.cat([features.prefix, features.tokens], 1)
    torch.testing.assert_close(ep(encoder, images), ep.classifier(ep.pool(whole)))
    with pytest.raises(ModelError, match=r"divide the encoder's width 16; found 5 \* 1"):
        Ep(queries=5).build(encoder, 5)


def test_a_classifier_normalises_by_its_batch_and_takes_one_row():
    classifier, x = Classifier(6, 4), 5 + 3 * torch.randn(64, 6)
    rows = (x - x.mean(0)) / x.var(0, unbiased=False).add(1e-6).sqrt()
    torch.testing.assert_close(classifier(x), classifier.linear(rows))
    assert classifier(x[:1]).isfinite().all()
