"""The composed vision-language model: encode, prune, project, splice, decode, loss."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from vlm.models.base import BaseVlm, Overview, pixel_seed
from vlm.models.encoder import Features, unread
from vlm.models.errors import ModelError
from vlm.models.program.debias import picture_share
from vlm.models.program.layout import Layout, Side, compact
from vlm.models.program.perturb import edited, insertion
from vlm.models.program.run import Run
from vlm.models.program.signals import Vision
from vlm.models.splice import IMAGE_TOKEN, Visual, check_placeholders, splice
from vlm.models.tiles import TileTable, shape_table, tile_table


class Inputs(NamedTuple):
    """A batch as the data layer makes it: rows of token ids, one placeholder (-1) per image.

    valid marks real tokens. Image i belongs to row owner[i]; its placeholder is the next one of that row in
    reading order. keys name the samples in error messages.

    tiles: for images that come in several views: rows and columns of each image's tiles, height and width of its
    picture in pixels (any unit will do). ``images`` then holds, image by image, the whole and its tiles row by row.
    For an encoder whose pictures keep their shape, rows and columns are 0, and each picture stands in the upper left
    corner of its image with that height and width.

    pack: which sequence of the decoder each row goes into (see :mod:`vlm.models.pack`); None: one each.
    """

    tokens: Int[Tensor, "batch length"]
    valid: Bool[Tensor, "batch length"]
    images: Float[Tensor, "views 3 height width"]
    owner: Int[Tensor, " images"]
    keys: Sequence[str] = ()
    tiles: Int[Tensor, "images 4"] | None = None
    pack: Int[Tensor, " batch"] | None = None

    def without_images(self) -> "Inputs":
        """The same prompts with their images removed, placeholders included."""
        index, valid = compact(self.valid & (self.tokens != IMAGE_TOKEN), "right")
        tokens = self.tokens.gather(1, index).masked_fill(~valid, 0)
        tiles = None if self.tiles is None else self.tiles[:0]
        return Inputs(tokens, valid, self.images[:0], self.owner[:0], self.keys, tiles)

    def insert(self, ids: Sequence[int], start: bool = False) -> "Inputs":
        """The same prompts with the tokens ``ids`` put in after their last image (with ``start``, and in a row without
        an image, after its first token)."""
        put = insertion((self.tokens == IMAGE_TOKEN) & self.valid, self.valid, len(ids), start)
        return self._replace(tokens=put(self.tokens, self.tokens.new_tensor(ids)), valid=put(self.valid, 1))

    @property
    def visual(self) -> Bool[Tensor, "batch length"]:
        """Where images stand."""
        return (self.tokens == IMAGE_TOKEN) & self.valid

    def edit(
        self, ids: Sequence[Sequence[int]], at: Int[Tensor, " batch"], drop: Bool[Tensor, "batch length"] | None = None
    ) -> "Inputs":
        """The same prompts without the text at ``drop``, and with ``ids[row]`` after the place ``at`` of each row."""
        keep = self.valid if drop is None else self.valid & ~drop
        put, fresh, valid = edited(keep, at, ids, "right")
        return self._replace(tokens=put(self.tokens, fresh), valid=valid)

    def doubled(self) -> "Inputs":
        """The same prompts with their one image twice in succession. Raises ModelError where a row has more of them, or
        an image has tiles."""
        if self.tiles is not None and bool(self.tiles[:, :2].any()):
            raise ModelError("images: expected images of one view each to show them twice; found tiles")
        count = self.visual.sum(1)
        if len(more := (count > 1).nonzero().flatten()):
            raise ModelError(f"images: expected one image to show it twice; found several in row {int(more[0])}")
        place = torch.arange(1, self.tokens.shape[1] + 1, device=self.tokens.device)
        new = self.edit([[IMAGE_TOKEN] * number for number in count.tolist()], (self.visual * place).amax(1) - 1)
        tiles = None if self.tiles is None else self.tiles.repeat_interleave(2, 0)
        images, owner = self.images.repeat_interleave(2, 0), self.owner.repeat_interleave(2, 0)
        return new._replace(images=images, owner=owner, tiles=tiles)


class VisionLanguageModel(BaseVlm):
    """A vision encoder, a connector and a causal language model.

    Parts are named as in a recipe: ``vision``, ``connector``, ``language``. max_tiles: views that an image may have
    besides the whole one. newline: rows of the joined tiles end with a learned token (LLaVA-NeXT), which belongs to the
    connector. A cut in or after the encoder is of patches; a newline stays beyond its budget as long as a token of its
    row does. In the language model, from ``llm.in`` on, newlines are visual tokens like others.
    """

    # Any: nn.Module's attribute types hide what Encoder and the connectors promise.
    vision: Any
    connector: Any

    def __init__(
        self,
        vision: nn.Module,
        connector: nn.Module,
        language: PreTrainedModel,
        max_tiles: int = 0,
        newline: bool = False,
    ) -> None:
        super().__init__()
        self.vision, self.connector, self.language, self.max_tiles = vision, connector, language, max_tiles
        if self.max_patches and (max_tiles or not self.connector.token_wise):
            found = f"{max_tiles} tiles" if max_tiles else f"{type(connector).__name__}, which mixes tokens"
            raise ModelError(
                f"model: with {type(vision).__name__}, whose pictures have a grid each, expected image.tiling: none "
                f"and a connector that works token by token (linear, mlp without shuffle); found {found}"
            )
        self.visual_grid: tuple[int, int] = self.connector.grid(*self.vision.grid)
        self.newline: nn.Parameter | None = None
        if newline:
            if not max_tiles or not self.spatial:
                found = "places that do not say what they show" if max_tiles else "no tiles"
                raise ModelError(f"model.image.newline: expected tiles of patches, whose rows can end; found {found}")
            width: int = language.config.hidden_size  # type: ignore[assignment]
            self.newline = nn.Parameter(torch.randn(width) / width**0.5)

    @property
    def places(self) -> Mapping[str, Sequence[str]]:
        return super().places if self.newline is None else {**super().places, "connector": ("connector", "newline")}

    @property
    def decoder(self) -> Any:
        """The language model without its head."""
        return self.language.get_decoder()

    @property
    def head(self) -> Any:
        return self.language.get_output_embeddings()

    @property
    def visual_tokens(self) -> int | None:
        """Visual tokens of an image before any cut; None where images come in tiles or in their own shapes."""
        return None if self.max_tiles or self.max_patches else self.most_visual_tokens

    @property
    def max_patches(self) -> int:
        """The most patches of a picture that keeps its shape; 0 where pictures do not."""
        return getattr(self.vision, "max_patches", 0)

    @property
    def most_visual_tokens(self) -> int:
        """Visual tokens of an image before any cut, with as many tiles as it may have."""
        rows, cols = self.visual_grid
        lines = 0 if self.newline is None else rows * self.max_tiles
        return self.max_patches or rows * cols * (1 + self.max_tiles) + lines

    @property
    def idle(self) -> list[str]:
        """What of the encoder never trains: weights that its features do not read, and what it keeps as it is."""
        return self._idle

    @cached_property
    def _idle(self) -> list[str]:
        return [f"vision.{name}" for name in (*unread(self.vision), *getattr(self.vision, "frozen", ()))]

    def overview(self, layout: Layout, sample: int) -> Overview | None:
        shown = layout.image[sample][layout.visual[sample]]
        if not len(shown):
            return None
        first, grid = int(shown.min()), self.visual_grid
        if self.max_patches:
            mine = layout.image[sample] == first
            grid = (int(layout.row[sample][mine].max()) + 1, int(layout.col[sample][mine].max()) + 1)
        return Overview(first, 0, *grid)  # tiles stand below the whole

    def visual_counts(self, inputs: Inputs) -> Int[Tensor, " batch"]:
        return self._counts(inputs, self._tiles(inputs))

    def _counts(self, inputs: Inputs, table: TileTable | None) -> Int[Tensor, " batch"]:
        if table is None:
            whole = self.visual_grid[0] * self.visual_grid[1]
            return whole * torch.bincount(inputs.owner, minlength=len(inputs.tokens))
        return inputs.owner.new_zeros(len(inputs.tokens)).scatter_add(0, inputs.owner, table.size)

    def _tiles(self, inputs: Inputs) -> TileTable | None:
        """What the views of a batch are; None where each is an image of one and the same grid."""
        if self.max_patches:
            return shape_table(self.vision.grids(self._sizes(inputs))) if len(inputs.images) else None
        if inputs.tiles is None or not len(inputs.tiles):
            return None
        most = int((inputs.tiles[:, 0] * inputs.tiles[:, 1]).max())
        if most > self.max_tiles:
            raise ModelError(f"images: expected at most {self.max_tiles} tiles of an image; found {most}")
        newline = self.newline is not None
        return tile_table(inputs.tiles, self.visual_grid, self.spatial, len(inputs.images), newline)

    def _sizes(self, inputs: Inputs) -> Int[Tensor, "images 2"]:
        """Height and width of pictures that keep their shape."""
        if inputs.tiles is None:
            return inputs.owner.new_tensor(inputs.images.shape[2:]).expand(len(inputs.images), 2)
        if len(inputs.tiles) != len(inputs.images) or bool(inputs.tiles[:, :2].any()):
            raise ModelError(f"images: expected {len(inputs.images)} pictures in one view each; found tiles")
        return inputs.tiles[:, 2:]

    def _look(self, inputs: Inputs) -> Features:
        """The encoder's features of a batch's views: tokens [N,P,V]."""
        return self.vision(inputs.images, self._sizes(inputs)) if self.max_patches else self.vision(inputs.images)

    def _seed(self, inputs: Inputs) -> Int[Tensor, " views"]:
        """An integer of each view's pixels, whatever it is padded to. Few methods ask: it reads every pixel."""
        if not self.max_patches or not len(inputs.images):
            return pixel_seed(inputs.images)
        return pixel_seed(self.vision.patches(inputs.images, self.vision.grids(self._sizes(inputs)))[0])

    @property
    def spatial(self) -> bool:
        """Whether a visual token's place says which part of the picture it shows."""
        return self.connector.spatial and getattr(self.vision, "spatial", True)

    @property
    def refuses(self) -> Mapping[str, str]:
        hidden = () if self.spatial else ("TokenShown", "PatchShown")
        padding: dict[str, str] = dict.fromkeys(hidden, self._unpadded)
        if self.connector.token_wise:
            return padding
        grids = f"{self.vision.grid} to {self.visual_grid}"
        why = f"the connector {type(self.connector).__name__} mixes tokens, {grids}; prune at llm.in instead"
        return {**dict.fromkeys(("vit.mid", "vit.after", "vit.out"), why), **padding}

    @property
    def vision_facts(self) -> Vision:
        encoder = self.vision
        blind = "" if encoder.blocks else f"{type(encoder).__name__} has no attention blocks"
        blind = getattr(encoder, "blind", "") or blind
        known = (encoder.depth, len(encoder.blocks), encoder.output, encoder.class_token, encoder.cuts, blind)
        return Vision(*known, encoder.dim, getattr(encoder, "kind", ""))

    def patch_features(
        self, inputs: Inputs
    ) -> tuple[Float[Tensor, "batch visual width"], Bool[Tensor, "batch visual"]]:
        if not self.connector.token_wise:
            return super().patch_features(inputs)
        if not len(inputs.images):
            return inputs.images.new_zeros(len(inputs.tokens), 0, self.vision.dim), inputs.valid[:, :0]
        return self._by_row(self._look(inputs).tokens, inputs)

    def picture_share(self, inputs: Inputs) -> Float[Tensor, "batch visual"]:
        if not self.spatial:
            return super().picture_share(inputs)
        if not len(inputs.images):
            return inputs.images.new_zeros(len(inputs.tokens), 0)
        if self.max_patches:  # nothing is padded
            counts = self.visual_counts(inputs)
            return (torch.arange(int(counts.max()), device=counts.device) < counts[:, None]).float()
        return self._by_row(self._shown(inputs, self.visual_grid)[..., None], inputs)[0][..., 0]

    def _shown(self, inputs: Inputs, grid: tuple[int, int]) -> Float[Tensor, "views tokens"]:
        """How much of each place of a view's grid shows the picture; all of it where nothing is padded."""
        if self.max_patches:
            return inputs.images.new_ones(len(inputs.images), grid[0] * grid[1])
        return picture_share(inputs.images, self.vision.image.mean, self.vision.image.std, grid)

    def _by_row(
        self, values: Float[Tensor, "views tokens width"], inputs: Inputs
    ) -> tuple[Float[Tensor, "batch visual width"], Bool[Tensor, "batch visual"]]:
        """What the tokens of views have, as that of each row's visual tokens before any cut, and which are real."""
        table, count = self._tiles(inputs), self.visual_counts(inputs)
        values = torch.cat(
            [values, torch.ones_like(values[..., :1])], -1
        )  # newlines, of which there is no patch, have 0
        if table is None:
            seen = Visual(values, self.visual_grid, inputs.owner)
        else:
            seen = table.join(values, inputs.owner, newline=values.new_zeros(values.shape[2]))
        rows = pad_sequence(list(seen.features[seen.valid].split(count.tolist())), batch_first=True)  # owners ascend
        return rows[..., :-1], rows[..., -1] > 0

    def map_pixels(self, inputs: Inputs, change: Callable[[Tensor, int], Tensor]) -> Inputs:
        if self.max_patches and len(inputs.images):
            images = inputs.images.clone()
            for number, (height, width) in enumerate(self._sizes(inputs).tolist()):
                images[number, :, :height, :width] = change(images[number, :, :height, :width], number)
            return inputs._replace(images=images)
        pictures = [change(pixels, number) for number, pixels in enumerate(inputs.images)]
        return inputs._replace(images=torch.stack(pictures)) if pictures else inputs

    def encode(self, inputs: Inputs, table: TileTable | None, seed: Callable[[], Int[Tensor, " views"]]) -> Visual:
        """Encode, prune and project the images of a batch; the views of all of them go through the encoder at once.

        table: what the views are, where they are not an image each. seed: gives an integer of each view's pixels.
        """
        engine = None if self.engine is None else self.engine.vision
        cut = None
        if engine is None or not engine.acts:
            found = self._look(inputs)
        else:
            each = torch.arange(len(inputs.images), device=inputs.owner.device)
            views: tuple[Tensor, ...] = (each,) if table is None else (table.image, table.real)
            if self.max_patches:
                views += (self.vision.grids(self._sizes(inputs))[:, 1:],)
            engine.begin(seed, *views, shown=lambda: self._shown(inputs, self.vision.grid))
            found = self._look(inputs)
            cut = engine.finish(found.tokens)
        features = found.tokens if cut is None else cut.features.to(found.tokens.dtype)
        left: Any = () if cut is None or engine is None else (cut.place, cut.valid, engine.position == "keep")
        projected = self.connector(features, found.grid)
        if table is None:
            return Visual(projected, self.visual_grid, inputs.owner, *left)
        left = left or (None, None, False)
        return table.join(projected, inputs.owner, *left, newline=self.newline)

    def _enter(self, inputs: Inputs, side: Side | None) -> tuple[Tensor, Run]:
        side = side or "right"
        check_placeholders(inputs.tokens, inputs.valid, inputs.owner, inputs.keys)
        embedded = self.language.get_input_embeddings()(inputs.tokens.clamp_min(0))
        if self.newline is not None and self.training:  # not every batch has tiles; see _without_images
            embedded = embedded + 0.0 * self.newline.sum().to(embedded.dtype)
        table, seed = self._tiles(inputs), cache(lambda: self._seed(inputs))
        if len(inputs.images):
            visual = self.encode(inputs, table, seed)
        else:
            visual, embedded = self._without_images(inputs, embedded)
        embeds, layout = splice(inputs.tokens, inputs.valid, embedded, visual, side)
        run = Run(layout, side, seed if table is None else lambda: table.sum_by_image(seed()) % 2**40)
        run.grids = self._grids(inputs)
        run.total = self._counts(inputs, table)  # an encoder may have cut some already
        return (embeds if self.engine is None else self.engine.enter_language(embeds, run)), run

    def _grids(self, inputs: Inputs) -> list[tuple[int, int]]:
        """Rows and columns of each image's visual tokens; none where they are no one grid."""
        if self.max_patches and len(inputs.images):
            return [(rows, cols) for rows, cols in self.vision.grids(self._sizes(inputs)).tolist()]
        whole = inputs.tiles is None or not len(inputs.tiles)
        return [self.visual_grid] * len(inputs.images) if whole and self.spatial else []

    def _without_images(self, inputs: Inputs, embedded: Tensor) -> tuple[Visual, Tensor]:
        """No image in the batch: in training the vision path runs all the same, on a blank image times zero.

        Otherwise its parameters would get no gradient here while another rank waits to reduce theirs.
        """
        empty = embedded.new_zeros(0, 1, embedded.shape[2])
        if self.training and any(p.requires_grad for m in (self.vision, self.connector) for p in m.parameters()):
            size = self.vision.image.size
            found = self.vision(embedded.new_zeros(1, 3, size, size))
            embedded = embedded + 0.0 * self.connector(found.tokens, found.grid).sum().to(embedded.dtype)
        return Visual(empty, self.visual_grid, inputs.owner), embedded

    def logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocab"]:
        """The language model's head, with the scaling or soft cap that its config asks for."""
        config: Any = self.language.config
        head: Any = self.language.get_output_embeddings()
        logits = head(hidden)
        logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap
