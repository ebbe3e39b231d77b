"""The contexts that a decode may keep besides the main one: the same prompts with something changed.

Each becomes a stream with a cache of its own that gets the same generated tokens. A new one is one class here.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.perturb import diffused, masked
from vlm.models.program.run import Run
from vlm.models.program.signals import Received, Signal

MAIN = "main"


@dataclass(frozen=True)
class Context:
    """How the prompts of another stream are made from those of the main one. Equal contexts share a stream.

    alters: what is changed. image: whether its prompts still show an image. needs: signals of the main prompt.
    """

    alters: ClassVar[Literal["image", "text"]]
    image: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return ()

    @property
    def name(self) -> str:
        """What its stream is called."""
        options = ", ".join(f"{value!r}" for value in vars(self).values())
        word = type(self).__name__.lower()
        return f"{word}({options})" if options else word

    def inputs(self, model: Any, inputs: Any, main: Run) -> Any:
        """The prompts of this context; ``main`` is what is known of the main prompts, which have been run."""
        raise NotImplementedError


@dataclass(frozen=True)
class NoImage(Context):
    """The prompts without their images."""

    alters: ClassVar[Literal["image", "text"]] = "image"
    image: ClassVar[bool] = False

    def inputs(self, model: Any, inputs: Any, main: Run) -> Any:
        return inputs.without_images()


@dataclass(frozen=True)
class Noised(Context):
    """Images under the noise of step ``step`` of a diffusion; ``seed`` gives other noise for the same image."""

    alters: ClassVar[Literal["image", "text"]] = "image"

    step: int
    seed: int = 0

    def inputs(self, model: Any, inputs: Any, main: Run) -> Any:
        return model.map_pixels(inputs, lambda pixels, number: diffused(pixels, self.step, self.seed))


@dataclass(frozen=True)
class Disturbed(Context):
    """The tokens ``ids`` put in after the last image of each prompt, or with ``start`` after its first token."""

    alters: ClassVar[Literal["image", "text"]] = "text"

    ids: tuple[int, ...]
    start: bool = False

    def inputs(self, model: Any, inputs: Any, main: Run) -> Any:
        return inputs.insert(self.ids, self.start)


@dataclass(frozen=True)
class Masked(Context):
    """Images of which only the patches that the question looks at most are left, a share ``keep`` of them.

    layer: of the decoder, whose attention (from the text after the last image, summed over rows, mean over heads) says
    where the question looks. Patches that a cut before that layer dropped count as not looked at.
    """

    alters: ClassVar[Literal["image", "text"]] = "image"

    layer: int
    keep: float

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Received(self.layer, "text"),)

    def inputs(self, model: Any, inputs: Any, main: Run) -> Any:
        kept = self.kept(main)

        def change(pixels: Tensor, number: int) -> Tensor:
            if pixels.ndim != 3 or number >= len(kept):
                raise ModelError(f"masked image: expected one picture for each of {len(kept)} grids; found more views")
            return masked(pixels, kept[number])

        return model.map_pixels(inputs, change)

    def kept(self, main: Run) -> list[Bool[Tensor, "rows cols"]]:
        """The patches of each image that stay. Raises ModelError where images are no grids of patches, or where no
        question follows an image."""
        layout, relevance = main.layouts[main.stage(self.layer)], main.get(self.needs[0], self.layer)
        question = layout.valid & ~layout.visual
        question &= torch.arange(question.shape[1], device=question.device) > layout.last(layout.visual)[:, None]
        if len(blind := (layout.visual.any(1) & ~question.any(1)).nonzero().flatten()):
            raise ModelError(f"masked image: expected a question after the image; found none in row {int(blind[0])}")
        if not main.grids and bool(layout.visual.any()):
            raise ModelError("masked image: expected images that are one grid of patches each; found several views")
        return [self._of_image(layout.image == n, layout, relevance, grid) for n, grid in enumerate(main.grids)]

    def _of_image(self, here: Tensor, layout: Any, relevance: Tensor, grid: tuple[int, int]) -> Tensor:
        cells = grid[0] * grid[1]
        score = relevance.new_full((cells,), -1.0)
        score[(layout.row * grid[1] + layout.col)[here]] = relevance[here]
        kept = score.argsort(descending=True, stable=True)[: round(self.keep * cells)]
        chosen = torch.zeros(cells, dtype=torch.bool, device=score.device)
        chosen[kept] = score[kept] >= 0
        return chosen.unflatten(0, grid)
