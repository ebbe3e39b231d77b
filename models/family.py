"""What one family of Hugging Face models does differently: how images become tokens, where they stand, which
positions and which visibility they have. The families are the files of ``models/families``."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.layout import Layout


class Picture(NamedTuple):
    """One image (a tile, where a family's sequence keeps tiles apart) as its tokens, in the order they stand in.

    row, col: the token's place. Where a family shows an image several times (thumbnail and tiles) the grids stand one
    below the other; a token that ends a row of the grid (a newline) is one column after the row's last.
    pixels: what the encoder saw of it, in any shape. deep: further features that are added inside the decoder, one
    tensor for each of its first layers.
    """

    features: Float[Tensor, "tokens width"]
    row: Int[Tensor, " tokens"]
    col: Int[Tensor, " tokens"]
    pixels: Float[Tensor, "..."]
    deep: Sequence[Float[Tensor, "tokens width"]] = ()


class Family:
    """The adapter of a family: a subclass in a file of ``models/families``, the only public one there.

    model_types: the ``model_type`` of the configs it serves. refuses: what programs may not do to it, and why. deep:
    after how many decoder layers visual features are added.
    """

    model_types: ClassVar[tuple[str, ...]]
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

    def pictures(self, media: Mapping[str, Tensor]) -> list[Picture]:
        """The images of a batch in reading order; ``media`` are the processor's tensors about images."""
        raise NotImplementedError

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
