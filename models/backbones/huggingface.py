"""A vision transformer of Transformers as the encoder: ``vision: {use: huggingface, name: facebook/dinov2-base}``."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from vlm.models.encoder import Features, ImageSpec
from vlm.models.errors import ModelError

_INTERPOLATION = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as image processors keep them


class HuggingFace(nn.Module):
    """CLIP, SigLIP, SigLIP 2 (fixed size), DINOv2, DINOv3 and others with square patches, by hub name or folder.

    Of a model with a text side only the vision side is loaded. Pixels come as its image processor says.

    Args:
        name: hub name or folder.
        layer: block whose features are taken, as in LLaVA's ``vision_feature_layer``: -2 is the output of the last but
            one. -1 is the model's ``last_hidden_state`` (with the final norm, except in CLIP).
        image: side of the input in pixels, for models that take any size (DINO); the model's own by default.
    """

    source: ClassVar[str] = "Transformers library"
    verified: ClassVar[str] = "library"

    def __init__(self, name: str, layer: int = -2, image: int | None = None) -> None:
        super().__init__()
        try:
            config: Any = AutoConfig.from_pretrained(name)
            config = getattr(config, "vision_config", config)
            self.model: Any = AutoModel.from_pretrained(name, config=config)
            processor: Any = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ModelError(f"model.vision: no encoder at {name!r}: {str(error).splitlines()[0]}") from None
        depth = getattr(config, "num_hidden_layers", 0)
        patch = getattr(config, "patch_size", None)
        if not isinstance(patch, int) or not -depth <= layer < depth:
            expected = f"square patches and a layer in {-depth}..{depth - 1}"
            raise ModelError(f"model.vision: {name!r}: expected {expected}; found patch {patch}, layer {layer}")
        self.layer = layer
        side = image or config.image_size
        names = _INTERPOLATION.get(int(processor.resample), "bicubic")
        self.image = ImageSpec(side, tuple(processor.image_mean), tuple(processor.image_std), names)
        self.grid = (side // patch, side // patch)
        self.dim: int = config.hidden_size
        self.depth, self.output = depth, layer % depth
        self.prefix = self._prefix()
        self.class_token = self.prefix > 0
        rotary = any(hasattr(module, "inv_freq") for module in self.model.modules())
        self.cuts = f"{config.model_type} gives its blocks rotary positions" if rotary else ""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        lists = (m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.depth)
        return list(next(lists, ()))

    def _prefix(self) -> int:
        """Tokens before the patches (class token and registers), from one pass without gradient."""
        device, side = next(self.model.parameters()).device, self.image.size
        with torch.no_grad():
            found = self.model(torch.zeros(1, 3, side, side, device=device)).last_hidden_state
        return found.shape[1] - self.grid[0] * self.grid[1]

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Features:
        if self.prefix < 0 or images.shape[2:] != torch.Size([self.image.size] * 2):
            raise ModelError(
                f"model.vision: expected pixels of side {self.image.size}; found {tuple(images.shape[2:])}"
            )
        if self.layer == -1:
            hidden = self.model(images).last_hidden_state
        else:
            # entry 0 is what enters the first block
            place = self.layer + 1 if self.layer >= 0 else self.layer
            hidden = self.model(images, output_hidden_states=True).hidden_states[place]
        prefix = hidden[:, : self.prefix] if self.prefix else None
        return Features(hidden[:, self.prefix :], self.grid, prefix)
