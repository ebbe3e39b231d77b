"""The OpenCLIP encoder against the tower's own blocks."""

import open_clip
import pytest
import torch

from vlm.models.backbones.openclip import OpenClip
from vlm.models.errors import ModelError

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in open_clip's own list of configs."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", SMALL)


@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_features_are_the_outputs_of_the_block(layer):
    encoder = OpenClip("tiny", layer=layer).eval()
    images, seen = torch.randn(2, 3, 32, 32), []
    block = encoder.model.transformer.resblocks[layer]
    handle = block.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        mine = encoder(images)
    handle.remove()
    assert torch.equal(mine.tokens, seen[0][:, 1:]) and mine.grid == encoder.grid == (4, 4) and encoder.dim == 64
    assert mine.prefix is not None and torch.equal(mine.prefix, seen[0][:, :1])
    assert encoder.image.size == 32 and encoder.image.mean == open_clip.OPENAI_DATASET_MEAN


def test_an_unknown_name():
    with pytest.raises(ModelError, match=r"^model.vision: open_clip has no model 'ViT-B-33': [^\n]*$"):
        OpenClip("ViT-B-33")


def test_a_layer_that_is_not_there():
    with pytest.raises(ModelError, match="'tiny' has no layer 3"):
        OpenClip("tiny", layer=3)
