"""The vision encoder inside a Hugging Face model whose projector works token by token, as programs see it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm.models.base import pixel_seed
from vlm.models.program.reduce import Reduced
from vlm.models.program.vision import VisionEngine

PLAIN = ("clip_vision_model", "siglip_vision_model")  # square patches, learned positions, one list of blocks


class Views(NamedTuple):
    """Which image each picture that the encoder sees belongs to, and which of its patches show some of that image."""

    image: Int[Tensor, " views"]
    real: Bool[Tensor, "views patches"]


class Tower:
    """What :class:`~vlm.models.program.vision.VisionEngine` asks of an encoder (see
    :class:`~vlm.models.encoder.Encoder`), over Transformers' own modules.

    layer: the ``vision_feature_layer`` of the config: an entry of the encoder's hidden states, 0 is what enters the
    first block; several are concatenated, and then tokens cannot go between blocks.
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module, config: Any, layer: int | Sequence[int]) -> None:
        self.encoder, self.projector = encoder, projector
        entries = [layer] if isinstance(layer, int) else list(layer)
        self.depth: int = config.num_hidden_layers
        self.output = max(entry % (self.depth + 1) for entry in entries) - 1
        self.prefix = int(has_class_token(config))
        self.class_token = self.prefix == 1
        self.cuts = f"it hands over the features of {len(entries)} blocks" if len(entries) > 1 else ""
        side = config.image_size // config.patch_size
        self.grid = (side, side)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        lists = (m for m in self.encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == self.depth)
        return list(next(lists, ()))

    def register_forward_hook(self, hook: Any, *, always_call: bool = False) -> Any:
        return self.encoder.register_forward_hook(hook, always_call=always_call)

    @contextmanager
    def cutting(self, engine: VisionEngine, views: Views | None) -> Iterator[list[Bool[Tensor, "views patches"]]]:
        """Pictures that are encoded within the block are cut by ``engine``; the list receives which patches stay.

        The projector gets every place of the grid, so that whatever arranges its output finds the shape it knows;
        places that are gone hold zeros and must be dropped afterwards. The list stays empty when nothing is cut.
        """
        marks: list[Bool[Tensor, "views patches"]] = []

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            pixels = args[0] if args else kwargs["pixel_values"]  # [N,3,H,W]
            each = torch.arange(len(pixels), device=pixels.device)
            engine.begin(lambda: pixel_seed(pixels), *(views or (each,)))

        def finish(module: nn.Module, args: tuple) -> tuple | None:
            cut = engine.finish(args[0])
            if cut is None:
                return None
            marks.append(self._marks(cut))
            return (self._in_place(cut).to(args[0].dtype), *args[1:])

        handles = [
            self.encoder.register_forward_pre_hook(begin, with_kwargs=True),
            self.projector.register_forward_pre_hook(finish),
        ]
        try:
            yield marks
        finally:
            for handle in handles:
                handle.remove()

    def _marks(self, cut: Reduced) -> Bool[Tensor, "views patches"]:
        image, number = cut.valid.nonzero(as_tuple=True)
        marks = torch.zeros(len(cut.place), self.grid[0] * self.grid[1], dtype=torch.bool, device=cut.place.device)
        return marks.index_put((image, cut.place[image, number]), torch.ones_like(image, dtype=torch.bool))

    def _in_place(self, cut: Reduced) -> Float[Tensor, "views patches width"]:
        """Every kept feature at its place of the grid, zeros elsewhere."""
        image, number = cut.valid.nonzero(as_tuple=True)
        whole = cut.features.new_zeros(len(cut.place), self.grid[0] * self.grid[1], cut.features.shape[2])
        return whole.index_put((image, cut.place[image, number]), cut.features[image, number])


def has_class_token(config: Any) -> bool:
    """Whether the encoder of that config puts a class token before its patches."""
    return config.model_type == "clip_vision_model"
