"""SigLIP 2 for pictures of any shape: ``vision: {use: naflex, name: google/siglip2-base-patch16-naflex}``."""

import json
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoImageProcessor
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

from vlm.models.encoder import Features, ImageSpec
from vlm.models.errors import ModelError
from vlm.models.part import Part

_INTERPOLATION = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as image processors keep them


class Naflex(Part):
    """A SigLIP 2 NaFlex checkpoint of Transformers: pictures keep their shape, each has a grid of its own.

    How many visual tokens a picture has and in which grid depends on it: the largest grid of its shape with at most
    ``max_patches``. Of a model with a text side only the vision side is loaded. Instead of a name a config makes an
    encoder with random weights.

    Args:
        name: hub name or folder.
        layer: block whose features are taken: -2 is the output of the last but one, -1 the model's
            ``last_hidden_state`` (with the final norm).
        max_patches: the most patches of a picture, and so its visual tokens; 256 as the checkpoints were published,
            which were trained with 128 to 1024.
        config: a Transformers config with ``model_type: siglip2_vision_model``.
        mean, std, interpolation: how pixels come to an encoder from a config.
    """

    source: ClassVar[str] = "SigLIP 2 (arXiv 2502.14786), section 2.4.2; Transformers library"
    verified: ClassVar[str] = "library"

    def __init__(
        self,
        name: str | None = None,
        layer: int = -2,
        max_patches: int = 256,
        config: Mapping[str, Any] | None = None,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        interpolation: str = "bilinear",
    ) -> None:
        super().__init__()
        if (name is None) == (config is None):
            raise ModelError("model.vision: naflex needs either a name or a config")
        if max_patches < 1:
            raise ModelError(f"model.vision: naflex: expected max_patches of at least 1; found {max_patches}")
        pixels: Any = (tuple(mean), tuple(std), interpolation)
        if name is not None:
            self.model, pixels = _load(name)
        else:
            self.model = _make(dict(config or {}))
        found: Any = self.model.config
        depth = found.num_hidden_layers
        if not -depth <= layer < depth:
            title = repr(name or found.model_type)
            raise ModelError(f"model.vision: {title}: expected a layer in {-depth}..{depth - 1}; found layer {layer}")
        self.model.use_head = False  # nobody reads the pooled picture
        self.layer, self.max_patches, self.patch = layer, max_patches, int(found.patch_size)
        side = isqrt(max_patches)
        self.image, self.grid = ImageSpec(side * self.patch, *pixels), (side, side)
        self.dim: int = found.hidden_size
        self.depth, self.output = depth, layer % depth
        self.prefix, self.class_token, self.cuts = 0, False, ""

    def options(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(self.model.config.to_json_string(use_diff=False))
        pixels = {"mean": self.image.mean, "std": self.image.std, "interpolation": self.image.interpolation}
        return {"layer": self.layer, "max_patches": self.max_patches, "config": config} | pixels

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.encoder.layers)

    def grids(self, sizes: Int[Tensor, "images 2"]) -> Int[Tensor, "images 2"]:
        """Rows and columns of pictures of these heights and widths. Raises ModelError for what are no patches."""
        grids = sizes // self.patch
        wrong = (grids * self.patch != sizes).any(1) | (grids.prod(1) > self.max_patches) | (grids.prod(1) < 1)
        if bool(wrong.any()):
            found = " x ".join(map(str, sizes[int(wrong.nonzero()[0])].tolist()))
            raise ModelError(
                f"model.vision: naflex: expected pictures of whole patches of {self.patch} pixels, 1 to "
                f"{self.max_patches} of them; found {found} pixels"
            )
        return grids

    def patches(
        self, images: Float[Tensor, "images 3 height width"], grids: Int[Tensor, "images 2"]
    ) -> tuple[Float[Tensor, "images patches values"], Bool[Tensor, "images patches"]]:
        """Each picture's patches row by row, filled up with zeros, and which there are."""
        rows = []
        for picture, (high, wide) in zip(images, grids.tolist(), strict=True):
            side = self.patch
            cut = picture[:, : high * side, : wide * side].unflatten(2, (wide, side)).unflatten(1, (high, side))
            rows.append(cut.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1))  # [3,h,s,w,s] -> [h*w,s*s*3]
        values = pad_sequence(rows, batch_first=True)
        return values, torch.arange(values.shape[1], device=images.device) < grids.prod(1)[:, None].to(images.device)

    def forward(
        self, images: Float[Tensor, "images 3 height width"], sizes: Int[Tensor, "images 2"] | None = None
    ) -> Features:
        """sizes: height and width of the picture in the upper left corner of each image; all of it by default. With
        sizes the tokens of smaller pictures are filled up on the right and ``grid`` is one row of them."""
        full = images.shape[2:]
        shapes = [tuple(full)] * len(images) if sizes is None else [tuple(size) for size in sizes.tolist()]
        grids = self.grids(torch.tensor(shapes, device="cpu"))  # numbers, also where a plan has no others
        values, there = self.patches(images, grids)
        mask = None if len(set(grids.prod(1).tolist())) == 1 else there
        last = self.layer == -1
        found = self.model(values, mask, grids, output_hidden_states=not last)
        # entry 0 is what enters the first block
        place = self.layer + 1 if self.layer >= 0 else self.layer
        hidden = found.last_hidden_state if last else found.hidden_states[place]
        grid = (full[0] // self.patch, full[1] // self.patch) if sizes is None else (1, values.shape[1])
        return Features(hidden, grid)


def _load(name: str) -> tuple[Any, tuple[Any, ...]]:
    """The model, and mean, standard deviation and filter of its pixels."""
    try:
        config: Any = AutoConfig.from_pretrained(name)
        config = getattr(config, "vision_config", config)
        _check(name, config)
        if torch.empty(0).device.type == "meta":  # a plan needs the shape and no weights
            model: Any = Siglip2VisionModel._from_config(config)
        else:
            model = Siglip2VisionModel.from_pretrained(name, config=config)
        processor: Any = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.vision: no encoder at {name!r}: {str(error).splitlines()[0]}") from None
    names = _INTERPOLATION.get(int(processor.resample), "bilinear")
    return model, (tuple(processor.image_mean), tuple(processor.image_std), names)


def _make(config: dict[str, Any]) -> Any:
    """An encoder with random weights."""
    kind = config.pop("model_type", None)
    try:
        found = type(AutoConfig.for_model(kind)).from_dict(config)
        _check(kind, found)
        return Siglip2VisionModel._from_config(found)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"model.vision.config: cannot build {kind!r}: {reason}") from None


def _check(name: Any, config: Any) -> None:
    if config.model_type != "siglip2_vision_model":
        raise ModelError(
            f"model.vision: {name!r}: expected a NaFlex checkpoint of SigLIP 2 (siglip2_vision_model); found "
            f"{config.model_type}, for which there is use: huggingface"
        )
