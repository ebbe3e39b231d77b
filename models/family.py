"""What one family of Hugging Face models does differently: how images become tokens, where they stand, which
positions and which visibility they have. The families are the files of ``models/families``."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm.models.errors import ModelError
from vlm.models.program.layout import Layout
from vlm.models.tower import PLAIN, PackedTower, Tower, Views, has_class_token


class Picture(NamedTuple):
    """One image (a tile, where a family's sequence keeps tiles apart) as its tokens, in the order they stand in.

    row, col: the token's place. Where a family shows an image several times (thumbnail and tiles) the grids stand one
    below the other; a token that ends a row of the grid (a newline) is one column after the row's last.
    pixels: what the encoder saw of it, in any shape. deep: further features that are added inside the decoder, one
    tensor for each of its first layers. kept: which tokens a cut before the connector left; None: all.
    """

    features: Float[Tensor, "tokens width"]
    row: Int[Tensor, " tokens"]
    col: Int[Tensor, " tokens"]
    pixels: Float[Tensor, "..."]
    deep: Sequence[Float[Tensor, "tokens width"]] = ()
    kept: Bool[Tensor, " tokens"] | None = None


class Family:
    """The adapter of a family: a subclass in a file of ``models/families``, the only public one there.

    model_types: the ``model_type`` of the configs it serves. places: where each role's modules and lone parameters lie
    in the model. refuses: what programs may not do to it, and why. deep: after how many decoder layers visual features
    are added.
    """

    model_types: ClassVar[tuple[str, ...]]
    places: ClassVar[Mapping[str, Sequence[str]]] = {
        "vision": ("model.vision_tower",),
        "connector": ("model.multi_modal_projector",),
        "language": ("model.language_model", "lm_head"),
    }
    refuses: ClassVar[Mapping[str, str]] = {}
    first_position: ClassVar[int] = 0

    def __init__(self, model: Any) -> None:
        self.model = model  # the Hugging Face model with its head
        self.config = model.config
        self.deep = 0

    @property
    def image_token(self) -> int:
        """The token that stands where a visual token goes."""
        return self.config.image_token_id

    @property
    def visual_tokens(self) -> int | None:
        """Visual tokens of every image; None where that depends on the image."""
        return None

    @property
    def tower(self) -> Tower | PackedTower | None:
        """The vision encoder for programs, in families where the places that it hands to the projector are known; else
        None."""
        return None

    @property
    def idle(self) -> Sequence[str]:
        """Where weights lie in the model that no pass reads."""
        return ()

    def views(self, media: Mapping[str, Tensor]) -> Views | None:
        """What the pictures that go through :attr:`tower` are; None where each is an image of its own."""
        return None

    def kept(
        self, marks: Bool[Tensor, "views patches"], media: Mapping[str, Tensor]
    ) -> Sequence[Bool[Tensor, " tokens"]]:
        """Which tokens of each image stay when ``marks`` are the patches that stay."""
        return list(marks)

    def slots(self, media: Mapping[str, Tensor], shape: Sequence[int]) -> Sequence[Int[Tensor, " tokens"]]:
        """Which patch each token of each image is, counted over the batch's pictures, -1 for none; ``shape``: pictures
        and patches of each."""
        return list(torch.arange(shape[0] * shape[1], device=media["pixel_values"].device).view(*shape))

    def whole_image(self, images: Sequence[int]) -> int:
        """Which of a sample's images in the layout shows its first image whole."""
        return images[0]

    def whole_view(self, rows: int, cols: int) -> tuple[int, int, int]:
        """Of an image's grid of rows x cols: the first row, the rows and the columns that show it whole."""
        return 0, rows, cols

    def pictures(self, media: Mapping[str, Tensor]) -> list[Picture]:
        """The images of a batch in reading order; ``media`` are the processor's tensors about images."""
        raise NotImplementedError

    def map_pixels(self, media: Mapping[str, Tensor], change: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
        """``media`` with every picture (where a family shows tiles, every tile) changed: ``change(pixels, number)``."""
        pixels = media["pixel_values"]
        if pixels.ndim not in (4, 5):
            shape = tuple(pixels.shape)
            raise ModelError(f"{self.config.model_type}: expected pixels [..., 3, H, W] to change; found {shape}")
        pictures, number = [], 0
        for picture in pixels.flatten(0, pixels.ndim - 4):
            real = bool(picture.any())  # rows of tiles are filled up with tiles of zeros
            pictures.append(change(picture, number) if real else picture)
            number += real
        return {**media, "pixel_values": torch.stack(pictures).reshape(pixels.shape)}

    def blank(self) -> dict[str, Tensor]:
        """The media of one blank image, as small as the family takes it."""
        side = self.config.vision_config.image_size
        side = side if isinstance(side, int) else side[0]
        return {"pixel_values": torch.zeros(1, 3, side, side)}

    def join(self, pictures: Sequence[Picture], visual: Bool[Tensor, "batch length"]) -> Sequence[Picture]:
        """Put together the tiles that the sequence shows as one image."""
        return pictures

    def axes(
        self,
        tokens: Int[Tensor, "batch length"],
        valid: Bool[Tensor, "batch length"],
        visual: Bool[Tensor, "batch length"],
        media: Mapping[str, Tensor],
    ) -> Int[Tensor, "batch length 3"] | None:
        """Position ids on three axes, for a family that has them."""
        return None

    def block(
        self, visual: Bool[Tensor, "batch length"], types: Int[Tensor, "batch length"] | None
    ) -> Int[Tensor, "batch length"] | None:
        """Blocks of tokens that see each other whatever their order, for a family that has them; -1 elsewhere.

        types: the processor's ``token_type_ids``.
        """
        return None

    def mask_types(self, layout: Layout) -> Int[Tensor, "batch length"]:
        """The ``token_type_ids`` from which Transformers makes the mask of :meth:`block`."""
        raise NotImplementedError

    def logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocab"]:
        """What the family's own class makes of hidden states: as a rule its head and nothing else."""
        return self.model.get_output_embeddings()(hidden)


def raster(
    features: Float[Tensor, "tokens width"],
    columns: int,
    pixels: Tensor,
    deep: Sequence[Float[Tensor, "tokens width"]] = (),
) -> Picture:
    """An image whose tokens are a grid of ``columns`` columns, row by row."""
    place = torch.arange(len(features), device=features.device)
    return Picture(features, place // columns, place % columns, pixels, deep)


def plain_tower(model: Any) -> Tower | None:
    """The tower of a LLaVA-like model; None where its encoder is built otherwise, or where what goes into the
    projector is not the encoder's patches (a class token is handed over, or a patch taken for one)."""
    config, vision = model.config, model.config.vision_config
    dropped = int(config.vision_feature_select_strategy == "default")
    if vision.model_type not in PLAIN or dropped != has_class_token(vision):
        return None
    inner = model.model
    return Tower(inner.vision_tower, inner.multi_modal_projector, vision, config.vision_feature_layer)


def after_features(model: Any) -> list[str]:
    """Names of what a LLaVA-like model never reads of its vision encoder: whatever comes after the block whose features
    are taken."""
    tower, depth = model.model.vision_tower, model.config.vision_config.num_hidden_layers
    layer = model.config.vision_feature_layer
    last = max(entry % (depth + 1) for entry in ([layer] if isinstance(layer, int) else layer))
    found = []
    for name, module in tower.named_modules(prefix="model.vision_tower"):
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            found += [f"{name}.{number}" for number in range(last, depth)]
        elif name.rpartition(".")[2] in ("post_layernorm", "head"):
            found.append(name)
    return found


def find_family(model_type: str) -> type[Family]:
    """The adapter for a config's ``model_type``. Raises ModelError naming the nearest one we know."""
    known: dict[str, type[Family]] = {}
    for file in sorted(Path(__file__).with_name("families").glob("*.py")):
        module = import_module(f"vlm.models.families.{file.stem}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Family) and value.__module__ == module.__name__:
                known |= dict.fromkeys(value.model_types, value)
    if model_type not in known:
        near = get_close_matches(model_type, known, n=1, cutoff=0.0)[0]
        raise ModelError(
            f"model: expected a model_type of {', '.join(sorted(known))}; found {model_type!r}; nearest: {near}"
        )
    return known[model_type]
