"""Packing by recipe: what a sample takes up in this model, and which stages can be packed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby
from math import prod
from typing import Any

import torch
from PIL import Image

from vlm.build import build_encoder, build_tokenizer
from vlm.create import create
from vlm.data.chat import ChatEncoder
from vlm.data.draw import Draw
from vlm.data.images import patch_grid, tile_grid
from vlm.data.index import load_manifest
from vlm.data.pack import Fill, PackConfig, Size, pack_fill
from vlm.data.schema import Sample
from vlm.data.store import Store
from vlm.data.stream import Packing, sizes_of
from vlm.evaluation.forecast import visual_per_layer
from vlm.models.base import BaseVlm
from vlm.models.errors import ModelError
from vlm.models.pack import check_packs
from vlm.models.program.program import LLM_IN, Program, Site
from vlm.models.tiles import tile_table
from vlm.processed import ProcessorEncoder
from vlm.recipe import Recipe, RecipeError
from vlm.recipe.schema import Stage

_BEFORE = 512  # samples that are looked at to say how full packs will be


def packing_of(recipe: Recipe, stage: Stage, model: BaseVlm, encoder: Any) -> Packing | None:
    """How the stage packs its samples; None where it does not.

    Raises RecipeError, naming the stage, for a model, objective or program that cannot be packed.
    """
    if stage.pack is None:
        return None
    program = _check(recipe, stage, model)
    pack = stage.pack
    start = recipe.prune.schedule.start if recipe.prune is not None and recipe.prune.schedule is not None else 0.0
    left = VisualTokens(program, model.facts.layers, start)
    if isinstance(encoder, ChatEncoder):
        composed: Any = model
        grids = (composed.visual_grid, composed.spatial, composed.vision.grid)
        measure: Any = ChatSize(encoder, left, *grids, composed.newline is not None)
    else:
        patch = getattr(model.family.config.vision_config, "patch_size", 1)  # type: ignore[attr-defined]
        measure = ProcessedSize(encoder, left, patch if isinstance(patch, int) else patch[0])
    return Packing(PackConfig(pack.tokens, pack.patches, pack.buffer, pack.age), measure)


def _check(recipe: Recipe, stage: Stage, model: BaseVlm) -> Program:
    """The program that the stage trains under, all of it before the decoder."""
    where = f"stage {stage.name}: pack"
    objective = create("objective", stage.objective)
    if not getattr(objective, "packs", False):
        raise RecipeError(f"{where}: objective {stage.objective.use} reads one sample per row; leave pack out")
    try:
        check_packs(model.decoder)
    except ModelError as error:
        raise RecipeError(f"stage {stage.name}: {error}") from None
    methods = [("prune", recipe.prune)] if recipe.prune else []
    methods += [("mitigate", method) for method in recipe.mitigate]
    program: Program = ()
    for kind, method in methods:
        own = create(kind, method).program(model.facts)
        if inside := [site for site, _ in own if not _before_decoder(site)]:
            raise RecipeError(
                f"{where}: {method.use} acts inside the language model ({inside[0].name}), where it reads one sample "
                "per row; leave pack out, or prune before it (vit.out, llm.in)"
            )
        program += own
    return program


def _before_decoder(site: Site) -> bool:
    return site.name.startswith("vit.") or site == LLM_IN


@dataclass(frozen=True)
class VisualTokens:
    """How many of an image's visual tokens reach the decoder: at most, and while a keep schedule still keeps more."""

    program: Program
    layers: int
    start: float = 0.0

    def __call__(self, visual: int, images: int = 1) -> int:
        """Of ``visual`` tokens of ``images`` images; where something is cut, room for rounding in each of them."""
        if not images or not self.program:
            return visual
        each = -(-visual // images)
        left = visual_per_layer(self.program, each, self.layers)[0][0]
        left = max(left, min(each, round(each * self.start)))
        return min(visual, images * left + (images if left < each and images > 1 else 0))


@dataclass(frozen=True)
class ChatSize:
    """Sizes of samples of a composed model: its text is tokenized; its images count by their number, or by their size
    where they are tiled or keep their shape.

    grid: visual tokens of a view before any cut; patches: the encoder's, of a view.
    """

    encoder: ChatEncoder
    left: VisualTokens
    grid: tuple[int, int]
    spatial: bool
    patches: tuple[int, int]
    newline: bool = False

    def __call__(self, sample: Sample, shown: Sequence[tuple[int, int]], draw: Draw) -> Size:
        tokens, _, refs = self.encoder.written(sample, draw)
        images = [self._image(*shown[ref]) for ref in refs]
        visual = sum(self.left(count - lines) + lines for count, lines, _ in images)  # newlines go with their rows
        return Size(len(tokens) - len(refs) + visual, sum(patches for _, _, patches in images), len(tokens))

    def _image(self, width: int, height: int) -> tuple[int, int, int]:
        """Visual tokens, newlines among them, and patches of an image."""
        transform, patches = self.encoder.transform, self.patches[0] * self.patches[1]
        if transform.max_patches:
            count = prod(patch_grid(height, width, transform.patch, transform.max_patches))
            return count, 0, count
        if not transform.max_tiles:
            return self.grid[0] * self.grid[1], 0, patches
        rows, columns = tile_grid(height, width, transform.size, transform.max_tiles)
        rows, columns = (0, 0) if rows * columns == 1 else (rows, columns)
        views = 1 + rows * columns
        table = tile_table(torch.tensor([[rows, columns, height, width]]), self.grid, self.spatial, views, self.newline)
        return int(table.size[0]), 0 if table.lines is None else len(table.lines.row), views * patches


@dataclass
class ProcessedSize:
    """Sizes of samples of a checkpoint: through its processor, with blank images of their sizes.

    What images of some sizes add is remembered, so that most samples are measured with the smallest of images; not
    where chats are cut to a length, which depends on all of it.
    """

    encoder: ProcessorEncoder
    left: VisualTokens
    patch: int
    known: dict[tuple[tuple[int, int], ...], tuple[int, int, int]] = field(default_factory=dict)

    SMALL = (28, 28)
    MOST = 2**16

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "known": {}}

    def __call__(self, sample: Sample, shown: Sequence[tuple[int, int]], draw: Draw) -> Size:
        sizes = tuple(shown)
        if self.encoder.max_tokens is None and sizes in self.known:
            small = self._blank(sample, [self.SMALL] * len(sizes), draw)
            if small.image_count == len(sizes):  # else its images were left out
                more, visual, patches = self.known[sizes]
                return self._size(len(small.tokens) + more, visual, patches, len(sizes))
            return self._size(len(small.tokens), 0, 0, 0)
        example = self._blank(sample, sizes, draw)
        visual, images = self._visual(example)
        patches = self._patches(example)
        if sizes and example.image_count == len(sizes) and self.encoder.max_tokens is None:
            small = self._blank(sample, [self.SMALL] * len(sizes), draw)
            if len(self.known) < self.MOST and images <= len(sizes):
                self.known[sizes] = (len(example.tokens) - len(small.tokens), visual, patches)
        return self._size(len(example.tokens), visual, patches, images)

    def _size(self, length: int, visual: int, patches: int, images: int) -> Size:
        return Size(length - visual + self.left(visual, images), patches, length)

    def _blank(self, sample: Sample, sizes: Sequence[tuple[int, int]], draw: Draw) -> Any:
        picture = partial(_blank_picture, tuple(sizes))
        return self.encoder.with_images(sample, Draw(draw.position, draw.epoch, draw.seed), picture)

    def _visual(self, example: Any) -> tuple[int, int]:
        """Visual tokens of an example, and of how many images: at least its runs of them."""
        marks = [token == self.encoder.image_id for token in example.tokens]
        runs = sum(visual for visual, _ in groupby(marks))
        return sum(marks), max(runs, example.image_count)

    def _patches(self, example: Any) -> int:
        pixels = example.media.get("pixel_values")
        if pixels is None:
            return 0
        return len(pixels) if pixels.ndim == 2 else pixels.numel() // (3 * self.patch**2)


def _blank_picture(sizes: Sequence[tuple[int, int]], ref: int) -> Image.Image:
    return _picture(*sizes[ref])


@lru_cache(maxsize=64)
def _picture(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (127, 127, 127))


def fill_of(stage: Stage, stores: Sequence[Store], seed: int, packing: Packing) -> Fill:
    """How full the stage's packs will be, from the first samples of its mixture."""
    weights, repeat = list(stage.mix.values()), stage.repeat is not None
    return pack_fill(sizes_of(stores, weights, seed, packing, _BEFORE, repeat), packing.config)


def plan_packs(recipe: Recipe, model: BaseVlm, made_later: bool) -> list[str]:
    """A line for each stage that packs: how full its packs will be. Raises RecipeError as :func:`packing_of` does."""
    lines = []
    for number, stage in enumerate(recipe.stages):
        if stage.pack is None:
            continue
        if made_later:
            _check(recipe, stage, model)
            lines.append(f"Stage {stage.name}: packs of {stage.pack.tokens:,} tokens; how full, the data will tell.")
            continue
        encoder = build_encoder(recipe, model, build_tokenizer(recipe), stage.drop_image)
        packing = packing_of(recipe, stage, model, encoder)
        assert packing is not None
        stores = [Store(load_manifest(list(recipe.data.sources[name].shards))) for name in stage.mix]
        fill = fill_of(stage, stores, recipe.seed + number, packing)
        lines.append(
            f"Stage {stage.name}: packs of {stage.pack.tokens:,} tokens, {100 * fill.share:.1f}% full with about "
            f"{fill.samples:.1f} samples each (of the first {_BEFORE} at most)."
        )
    return lines
