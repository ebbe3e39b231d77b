"""A model of a given shape with random weights and given image features: for what depends on the shape alone."""

import torch
from torch import Tensor, nn

from vlm.models.connectors.mlp import Mlp
from vlm.models.encoder import Features, ImageSpec
from vlm.models.language import build_language
from vlm.models.program.shape import DecoderShape
from vlm.models.splice import IMAGE_TOKEN
from vlm.models.vision_language import Inputs, VisionLanguageModel

VOCABULARY = 1000


class GivenFeatures(nn.Module):
    """An encoder without blocks that returns the same random features for any image."""

    dim, image = 64, ImageSpec(1, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    blocks, depth, output, prefix, class_token, cuts = (), 0, 0, 0, False, "its features are given"

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.features: Tensor
        self.register_buffer("features", torch.randn(1, grid[0] * grid[1], self.dim))

    def forward(self, images: Tensor) -> Features:
        return Features(self.features.expand(len(images), -1, -1), self.grid)


def stand_in(shape: DecoderShape, vision: nn.Module, vocabulary: int = VOCABULARY) -> VisionLanguageModel:
    """A Llama of that shape behind an encoder and a connector of two layers, in eval mode."""
    config = {
        "model_type": "llama",
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.width // shape.head_dim,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }
    connector = Mlp(vision.dim, shape.width)  # type: ignore[arg-type]
    return VisionLanguageModel(vision, connector, build_language(config, vocabulary)).eval()


def prompt(text: int, device: torch.device | None = None, side: int = 1, vocabulary: int = VOCABULARY) -> Inputs:
    """One row: half of ``text`` random tokens, an image of noise, the other half."""
    tokens = torch.randint(0, vocabulary, (1, text + 1), device=device)
    tokens[0, text // 2] = IMAGE_TOKEN
    owner = torch.zeros(1, dtype=torch.long, device=device)
    image = torch.randn(1, 3, side, side, device=device)
    return Inputs(tokens, torch.ones_like(tokens, dtype=torch.bool), image, owner)
