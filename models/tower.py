"""The vision encoder inside a Hugging Face model, as programs see it: one whose projector works token by token, or one
that packs its pictures and merges groups of patches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm.models.base import pixel_seed
from vlm.models.errors import ModelError
from vlm.models.program.packed_vision import PackedEncoding, PackedEngine, packed
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
        self.dim, self.kind = config.hidden_size * len(entries), str(config.model_type)
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
            image, real = views or (torch.arange(len(pixels), device=pixels.device), None)
            engine.begin(lambda: pixel_seed(pixels), image, real)

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


class PackedTower:
    """What :class:`~vlm.models.program.packed_vision.PackedEngine` asks of an encoder, over the one of Qwen2-VL,
    Qwen2.5-VL or Qwen3-VL: the patches of all pictures in one row, a merger that makes a group of them one visual token
    (and in Qwen3-VL mergers of earlier blocks).

    window: side in groups of the windows that order the row; None where pictures stand in raster order.
    """

    engine = PackedEngine
    prefix, class_token, cuts = 0, False, ""

    def __init__(self, encoder: Any) -> None:
        self.encoder, config = encoder, encoder.config
        self.depth: int = config.depth
        self.output = self.depth - 1
        self.merge: int = config.spatial_merge_size
        # hidden_size is the width after the merger in Qwen2-VL
        width = getattr(config, "embed_dim", None) or config.hidden_size
        self.dim, self.kind = width * self.merge**2, str(config.model_type)
        side = getattr(config, "window_size", None)
        self.window = None if side is None else side // self.merge // config.patch_size

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.encoder.blocks)

    def register_forward_hook(self, hook: Any, *, always_call: bool = False) -> Any:
        return self.encoder.register_forward_hook(hook, always_call=always_call)

    @contextmanager
    def cutting(self, engine: VisionEngine, views: Views | None) -> Iterator[list[Bool[Tensor, "images tokens"]]]:
        """As :meth:`Tower.cutting`; of the merger's output, places that are gone hold zeros."""
        marks: list[Bool[Tensor, "images tokens"]] = []
        left: list[PackedEncoding] = []  # what came out of the last block

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            pixels = args[0] if args else kwargs["hidden_states"]  # [patches, numbers]
            grids = args[1] if len(args) > 1 else kwargs["grid_thw"]  # [N,3]
            left.clear()
            engine.start(self._encoding(pixels, grids))

        def finish(module: nn.Module, args: tuple) -> tuple | None:
            now = packed(engine)
            assert now is not None
            cut = engine.finish(now.unpack(args[0]))
            if cut is None:
                return None
            left.append(now)
            marks.append(now.marks())
            return (now.pack(cut.features.to(args[0].dtype)), *args[1:])

        def spread(module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
            now = left[0] if left else packed(engine)  # the mergers of earlier blocks run before the end
            return None if now is None or not now.cut else now.spread(out)

        more = getattr(self.encoder, "deepstack_merger_list", ())
        handles = [
            self.encoder.register_forward_pre_hook(begin, with_kwargs=True),
            self.encoder.merger.register_forward_pre_hook(finish),
            *(merger.register_forward_hook(spread) for merger in (self.encoder.merger, *more)),
        ]
        try:
            yield marks
        finally:
            for handle in handles:
                handle.remove()

    def _encoding(self, pixels: Tensor, grids: Int[Tensor, "images 3"]) -> PackedEncoding:
        sizes = grids.tolist()
        if video := [size for size in sizes if size[0] != 1]:
            raise ModelError(f"vit: expected images of one frame to cut in the encoder; found {video[0][0]} frames")
        parts = pixels.split([rows * cols for _, rows, cols in sizes])
        shapes = [(rows // self.merge, cols // self.merge) for _, rows, cols in sizes]
        return PackedEncoding.of_grids(
            lambda: torch.cat([pixel_seed(part[None]) for part in parts]),
            shapes,
            self.window,
            self.merge**2,
            pixels.device,
        )


def has_class_token(config: Any) -> bool:
    """Whether the encoder of that config puts a class token before its patches."""
    return config.model_type == "clip_vision_model"
