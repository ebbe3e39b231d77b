"""A vision transformer of Transformers as the encoder: ``vision: {use: huggingface, name: facebook/dinov2-base}``."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from vlm.models.encoder import Features, ImageSpec
from vlm.models.errors import ModelError
from vlm.models.part import Part

_INTERPOLATION = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as image processors keep them


class HuggingFace(Part):
    """CLIP, SigLIP, SigLIP 2 (fixed size), DINOv2, DINOv3 and others with square patches, by hub name or folder.

    Of a model with a text side only the vision side is loaded. Pixels come as its image processor says. Instead of a
    name a config makes an encoder with random weights.

    Args:
        name: hub name or folder.
        layer: block whose features are taken, as in LLaVA's ``vision_feature_layer``: -2 is the output of the last but
            one. -1 is the model's ``last_hidden_state`` (with the final norm, except in CLIP).
        image: side of the input in pixels, for models that take any size (DINO); the model's own by default.
        config: a Transformers config with its ``model_type``.
        mean, std, interpolation: how pixels come to an encoder from a config.
    """

    source: ClassVar[str] = "Transformers library"
    verified: ClassVar[str] = "library"

    def __init__(
        self,
        name: str | None = None,
        layer: int = -2,
        image: int | None = None,
        config: Mapping[str, Any] | None = None,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        if (name is None) == (config is None):
            raise ModelError("model.vision: huggingface needs either a name or a config")
        if name is not None:
            found, pixels = self._load(name)
        else:
            found, pixels = self._make(dict(config or {})), (tuple(mean), tuple(std), interpolation)
        depth, patch = getattr(found, "num_hidden_layers", 0), getattr(found, "patch_size", None)
        if not isinstance(patch, int) or not -depth <= layer < depth:
            expected = f"square patches and a layer in {-depth}..{depth - 1}"
            title = repr(name or found.model_type)
            raise ModelError(f"model.vision: {title}: expected {expected}; found patch {patch}, layer {layer}")
        self.layer = layer
        side = image or found.image_size
        self.image = ImageSpec(side, *pixels)  # type: ignore[arg-type]
        self.grid = (side // patch, side // patch)
        self.dim: int = found.hidden_size
        self.kind: str = found.model_type
        self.depth, self.output = depth, layer % depth
        self.prefix = self._prefix()
        self.class_token = self.prefix > 0
        rotary = any(hasattr(module, "inv_freq") for module in self.model.modules())
        self.cuts = f"{found.model_type} gives its blocks rotary positions" if rotary else ""

    def _load(self, name: str) -> tuple[Any, tuple[Any, ...]]:
        """Config, and mean, standard deviation and filter of the pixels."""
        try:
            config: Any = AutoConfig.from_pretrained(name)
            config = getattr(config, "vision_config", config)
            _refuse_packed(name, config)
            if torch.empty(0).device.type == "meta":  # a plan needs the shape and no weights
                self.model: Any = AutoModel.from_config(config)
            else:
                self.model = AutoModel.from_pretrained(name, config=config)
            processor: Any = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ModelError(f"model.vision: no encoder at {name!r}: {str(error).splitlines()[0]}") from None
        names = _INTERPOLATION.get(int(processor.resample), "bicubic")
        return config, (tuple(processor.image_mean), tuple(processor.image_std), names)

    def _make(self, config: dict[str, Any]) -> Any:
        """Config of an encoder with random weights."""
        kind = config.pop("model_type", None)
        try:
            found = type(AutoConfig.for_model(kind)).from_dict(config)
            _refuse_packed(kind, found)
            self.model = AutoModel.from_config(found)
        except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"model.vision.config: cannot build {kind!r}: {reason}") from None
        return found

    def options(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(self.model.config.to_json_string(use_diff=False))
        side, mean, std, interpolation = self.image
        pixels = {"mean": mean, "std": std, "interpolation": interpolation}
        return {"layer": self.layer, "image": side, "config": config} | pixels

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


def _refuse_packed(name: Any, config: Any) -> None:
    """SigLIP 2's NaFlex checkpoints take patches packed in their own shapes, not a square image."""
    if config.model_type == "siglip2_vision_model":
        raise ModelError(
            f"model.vision: {name!r} is a NaFlex model, which takes packed patches of any shape; expected one of a "
            "fixed size, as SigLIP 2's others are, or use: naflex"
        )
