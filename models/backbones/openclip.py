"""The image tower of an OpenCLIP model as the encoder: ``vision: {use: openclip, name: ViT-B-32, layer: -2}``."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vlm.models.encoder import Features, ImageSpec
from vlm.models.errors import ModelError
from vlm.models.part import Part


class OpenClip(Part):
    """An image tower of the open_clip library, by its name there.

    Args:
        name: open_clip model name, such as ``ViT-B-32``.
        pretrained: a tag that open_clip publishes for it (needs the hub or a filled cache), or a file; random weights
            if not given.
        layer: block whose features are taken, without norm; -1 is the last block.
    """

    source: ClassVar[str] = "open_clip library"
    verified: ClassVar[str] = "library"

    def __init__(self, name: str, pretrained: str | None = None, layer: int = -2) -> None:
        super().__init__()
        import open_clip  # here, because importing it takes a second that `vlm methods` need not wait

        try:
            model: Any = open_clip.create_model(name, pretrained=pretrained)
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"model.vision: open_clip has no model {name!r}: {reason}") from None
        tower = model.visual
        spec = tower.preprocess_cfg
        side = spec["size"][0] if isinstance(spec["size"], tuple | list) else spec["size"]
        self.model, self.layer = tower, layer
        self.image = ImageSpec(side, tuple(spec["mean"]), tuple(spec["std"]), spec["interpolation"])
        self.dim, self.grid = self._probe(name)
        self.depth = len(self.blocks)
        self.output = self.layer % self.depth if self.depth else 0

    def options(self) -> dict[str, Any]:
        return super().options() | {"pretrained": None}

    @property
    def blocks(self) -> Sequence[nn.Module]:
        tower: Any = getattr(self.model, "trunk", None)  # a tower of timm in OpenCLIP's clothes
        if tower is not None:
            return list(tower.blocks) if isinstance(tower, VisionTransformer) else ()
        transformer = getattr(self.model, "transformer", None)
        return list(transformer.resblocks) if transformer is not None else ()

    def _probe(self, name: str) -> tuple[int, tuple[int, int]]:
        """Width and grid for images of the declared size, from one pass without gradient."""
        training, device = self.model.training, next(self.model.parameters()).device
        self.model.eval()
        try:
            with torch.no_grad():
                features = self(torch.zeros(1, 3, self.image.size, self.image.size, device=device))
        except (AssertionError, IndexError) as error:
            raise ModelError(f"model.vision: {name!r} has no layer {self.layer}: {error}") from None
        self.model.train(training)
        self.prefix = 0 if features.prefix is None else features.prefix.shape[1]
        self.class_token = self.prefix > 0
        self.cuts = "OpenCLIP hands its features over as a grid"
        return features.tokens.shape[2], features.grid

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Features:
        found = self.model.forward_intermediates(
            images, indices=[self.layer], intermediates_only=True, stop_early=True, output_extra_tokens=True
        )
        (grid,) = found["image_intermediates"]  # [N,V,h,w]
        (prefix,) = found.get("image_intermediates_prefix", (None,))
        return Features(grid.flatten(2).transpose(1, 2), (grid.shape[2], grid.shape[3]), prefix)
