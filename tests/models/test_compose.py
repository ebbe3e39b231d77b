"""Every kind of encoder with every kind of connector and language model: a forward pass, gradients, a generation."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipVisionConfig,
)

from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.backbones.fused import Fused
from vlm.models.backbones.huggingface import HuggingFace
from vlm.models.backbones.openclip import OpenClip
from vlm.models.backbones.timm import Timm
from vlm.models.connectors.linear import Linear
from vlm.models.connectors.mlp import Mlp
from vlm.models.connectors.resampler import Resampler
from vlm.models.errors import ModelError
from vlm.models.language import build_language
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate
from vlm.models.pruners.divprune import Divprune
from vlm.models.splice import IMAGE_TOKEN
from vlm.models.vision_language import Inputs, VisionLanguageModel

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GRID: dict[str, Any] = {"image_size": 48, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 20, "eos_token_id": 2}
CHECKPOINTS = {
    "clip": CLIPVisionConfig(**SIZES, **GRID),
    "clip with its text side": CLIPConfig(vision_config={**SIZES, **GRID}, text_config=TEXT),
    "siglip": SiglipVisionConfig(**SIZES, **GRID),
    # SigLIP 2 of a fixed size has SigLIP's architecture and type, with a larger vocabulary on the text side
    "siglip2": SiglipConfig(vision_config={**SIZES, **GRID}, text_config={**TEXT, "max_position_embeddings": 64}),
    "dinov2": Dinov2Config(**SIZES, **GRID),
    "dinov2 with registers": Dinov2WithRegistersConfig(**SIZES, **GRID, num_register_tokens=4),
    "dinov3": DINOv3ViTConfig(**SIZES, **GRID, num_register_tokens=2),
}
OPENCLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 48, "layers": 3, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}
LIBRARIES = {
    "timm": lambda: Timm("vit_tiny_patch16_224", layer=-10, image=96),
    "timm, rotary positions": lambda: Timm("eva02_tiny_patch14_224", layer=-11, image=84),
    "timm, a pyramid": lambda: Timm("resnet10t", layer=3, image=96),
    "openclip": lambda: OpenClip("tiny"),
    "conv_vit": lambda: ConvVit(48, dim=16, depth=2, heads=2),
}
LANGUAGES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
}


def checkpoint(config: Any, folder: Path) -> str:
    AutoModel.from_config(config).save_pretrained(folder)
    CLIPImageProcessor(size={"height": 48, "width": 48}, do_center_crop=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[*CHECKPOINTS, *LIBRARIES, "fused"])
def encoder(request, tmp_path_factory) -> Any:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", OPENCLIP)
        if request.param in LIBRARIES:
            return LIBRARIES[request.param]()
        folder = tmp_path_factory.mktemp("encoder")
        if request.param == "fused":
            names = ("siglip", "dinov2 with registers")
            return Fused([HuggingFace(checkpoint(CHECKPOINTS[name], folder / name)) for name in names])
        return HuggingFace(checkpoint(CHECKPOINTS[request.param], folder))


def batch_for(model: VisionLanguageModel) -> Inputs:
    """Two rows, of one image and of two; the second is longer."""
    side, place = model.vision.image.size, IMAGE_TOKEN
    tokens = torch.tensor([[3, place, 4, 5, 0, 0], [place, 6, 7, place, 8, 9]])
    valid = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    return Inputs(tokens, valid, torch.rand(3, 3, side, side), torch.tensor([0, 1, 1]))


@pytest.mark.parametrize(("connector", "kind"), [("mlp", "llama"), ("linear", "qwen3"), ("resampler", "llama")])
def test_it_trains_prunes_and_speaks(encoder, connector, kind):
    make = {"linear": Linear, "mlp": Mlp, "resampler": lambda v, d: Resampler(v, d, queries=9, heads=4)}[connector]
    language = build_language({**SIZES, "initializer_range": 0.25, **LANGUAGES[kind]}, 20)
    model = VisionLanguageModel(encoder, make(encoder.dim, 32), language).train()
    inputs = batch_for(model)
    out = model(inputs, (inputs.tokens >= 0).float() * inputs.valid)
    per_image = 9 if connector == "resampler" else encoder.grid[0] * encoder.grid[1]
    assert out.layout.visual.sum(1).tolist() == [per_image, 2 * per_image]
    model.zero_grad()
    out.loss.backward()
    embedding = next(encoder.parameters())  # the first layers are reached through all that come after
    assert torch.isfinite(out.loss) and embedding.grad is not None and embedding.grad.isfinite().all()
    without = {f"vision.{name}" for name, p in encoder.named_parameters() if p.grad is None}
    assert set(model.idle) == without  # what training leaves out, so that no rank waits for its gradient
    model.parts["vision"].requires_grad_(True)
    assert {f"vision.{name}" for name, p in encoder.named_parameters() if not p.requires_grad} == without
    for part in (model.connector, model.language):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())

    model.eval()
    answers = generate(model, inputs, max_new_tokens=3, stop=19)
    blind = generate(model, inputs._replace(images=1 - inputs.images), max_new_tokens=3, stop=19)
    assert len(answers) == 2 and all(0 <= token < 20 for answer in answers + blind for token in answer)
    with torch.no_grad():
        seen, other = (model(inputs._replace(images=x)).hidden for x in (inputs.images, 1 - inputs.images))
        assert not torch.allclose(seen, other)  # what is in the picture matters
        with attach(model, Divprune(keep=Budget.parse(4)).program(model.facts)):
            assert model(inputs).layout.visual.sum(1).tolist() == [4, 8]


@pytest.mark.parametrize("layer", [-1, -2])
def test_an_encoder_from_a_config_has_the_shape_of_the_checkpoint(tmp_path, layer):
    config = CHECKPOINTS["siglip"]
    stored = HuggingFace(checkpoint(config, tmp_path), layer)
    made = HuggingFace(layer=layer, config=config.to_dict(), mean=(0.1, 0.2, 0.3))
    assert made.image.mean == (0.1, 0.2, 0.3) and (made.grid, made.dim) == (stored.grid, stored.dim) == ((6, 6), 32)
    made.load_state_dict(stored.state_dict())
    images = torch.rand(1, 3, 48, 48)
    assert torch.equal(made.eval()(images).tokens, stored.eval()(images).tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either a name or a config"),
        ({"name": "x", "config": {}}, "either a name or a config"),
        ({"config": {"model_type": "siglop"}}, "model.vision.config: cannot build 'siglop'"),
        ({"config": {"hidden_size": 3}}, "model.vision.config: cannot build None"),
        (
            {"config": {"model_type": "clip_vision_model", **SIZES, **GRID}, "layer": 3},
            r"'clip_vision_model': .* layer 3",
        ),
    ],
)
def test_an_encoder_that_cannot_be_made(options: Any, message: str):
    with pytest.raises(ModelError, match=message) as error:
        HuggingFace(**options)
    assert "\n" not in str(error.value)


def test_naflex_is_refused(tmp_path):
    config = Siglip2VisionConfig(**SIZES, patch_size=8, num_patches=36)
    folder = checkpoint(config, tmp_path)
    ways: list[dict[str, Any]] = [{"name": folder}, {"config": config.to_dict()}]
    for options in ways:
        with pytest.raises(ModelError, match="is a NaFlex model, which takes packed patches of any shape"):
            HuggingFace(**options)
