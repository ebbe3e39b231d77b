"""Any timm vision model as the encoder: ``vision: {timm: vit_so400m_patch14_siglip_384, layer: -2}``."""

from difflib import get_close_matches
from typing import Any, ClassVar

import timm
from timm.data import resolve_model_data_config

from vlm.models.encoder import ImageSpec, TimmEncoder
from vlm.models.errors import ModelError


class Timm(TimmEncoder):
    """An encoder of the timm library, by its timm name.

    Args:
        name: timm model name, with or without a pretrained tag.
        layer: block whose features are taken; -2 is usual for CLIP and SigLIP in VLMs.
        pretrained: load the weights that timm publishes (needs the hub or a filled cache).
        image: side of the input in pixels; the model's own by default.
    """

    source: ClassVar[str] = "timm library"
    verified: ClassVar[str] = "library"

    def __init__(self, name: str, layer: int = -1, pretrained: bool = False, image: int | None = None) -> None:
        if not timm.is_model(name):
            near = get_close_matches(name.split(".")[0], timm.list_models(), n=5)
            raise ModelError(f"model.vision: timm has no model {name!r}; similar: {', '.join(near) or 'none'}")
        own = timm.get_pretrained_cfg(name) or timm.get_pretrained_cfg(name.split(".")[0])
        native = own.input_size[-1] if own else 224
        fixed = own is None or own.fixed_input_size  # a convolutional model takes any size and no such argument
        sized: dict[str, Any] = {"img_size": image} if image and image != native and fixed else {}
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **sized)
        config = resolve_model_data_config(model)
        spec = ImageSpec(image or native, tuple(config["mean"]), tuple(config["std"]), config["interpolation"])
        super().__init__(model, spec, layer)

    def options(self) -> dict[str, Any]:
        return super().options() | {"pretrained": False}
