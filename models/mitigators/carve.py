"""CARVE: Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning (ECCV 2026)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.looks import Looks, looks
from vlm.models.program.program import IMAGE, Prepare, Program
from vlm.models.program.prompts import asked, closing_of, last_place, words
from vlm.models.program.regions import keep_regions, refined, resized
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Carve:
    """The picture is cut down to what the model looks at for this question, compared with any question.

    Two answers are watched, one to the question and one to ``general`` in its place; where the first attends more than
    the second, token by token and in each of ``layers``, is what the question is about. Of a map of the ratios, later
    tokens counting more, the ``top`` share of pixels is kept, of its connected pieces the ``regions`` with the largest
    sums (or the ``top`` share of the pieces, if more). The rest gets the mean colour, and the box around the pieces is
    enlarged to the size of the picture. A prompt without an image stays as it is; pruners and all streams of a decode
    see the new pictures.

    top: share of the pixels (1 changes nothing; the paper found 0.2 to 0.6 good). layers: first and last decoder layer
        (default: those in place of 20 to 25 of 32). steps: tokens watched at most. general: the instruction; tokens:
        its ids instead. closing: how many tokens the prompt's template has after the question; null: as that says.
        form: the cut-out in the place of the picture (``replace``), or after it as a second one (``append``, as the
        released code asks; for prompts of one image each).
    """

    source: ClassVar[str] = "CARVE (ECCV 2026), section 4 and official code (its v4)"
    verified: ClassVar[str] = (
        "code by specification; the cut-out is made of the pixels that the encoder takes, not of the larger original; "
        "mean colour instead of black, the box has the picture's shape, no suffix is put to the question: ours"
    )

    top: float = 0.2
    regions: int = 3
    layers: tuple[int, int] | None = None
    steps: int = 32
    general: str = "Write a general description of the image."
    tokens: tuple[int, ...] = ()
    closing: int | None = None
    form: Literal["replace", "append"] = "replace"

    def program(self, facts: Facts) -> Program:
        if not 0 < self.top <= 1:
            raise ModelError(f"carve.top: expected a share above 0 and up to 1; found {self.top:g}")
        if self.regions < 1 or self.steps < 1:
            raise ModelError(f"carve: expected at least 1 of regions and steps; found {self.regions} and {self.steps}")
        first, last = self.layers or (20 * facts.layers // 32, 25 * facts.layers // 32)
        if not 0 <= first <= last < facts.layers:
            raise ModelError(f"carve.layers: expected first and last of 0..{facts.layers - 1}; found {first}, {last}")
        if self.top == 1:
            return ()
        ids, layers = words(facts, "carve.general", self.general, self.tokens), range(first, last + 1)

        def change(model: Any, inputs: Any, stop: int) -> Any:
            if not bool(inputs.visual.any()):
                return inputs
            places = asked(inputs, closing_of(model, self.closing, "carve.closing"))
            rows = [list(ids) if shown else [] for shown in inputs.visual.any(1).tolist()]
            about = inputs.edit(rows, last_place(inputs.visual), places)
            pair = [looks(model, asks, layers, self.steps, stop) for asks in (inputs, about)]
            return self._shown(model, inputs, contrasted(*pair))

        return ((IMAGE, Prepare(change, observes=True)),)

    def _shown(self, model: Any, inputs: Any, maps: list[Tensor]) -> Any:
        """The prompts with their pictures cut down to what ``maps`` (of each image) say."""

        def cut(pixels: Tensor, number: int) -> Tensor:
            if pixels.ndim != 3 or number >= len(maps):
                raise ModelError(f"carve: expected one picture for each of {len(maps)} grids; found patches or views")
            scores = resized(maps[number].to(pixels), (pixels.shape[1], pixels.shape[2]))
            return refined(pixels, keep_regions(scores, self.top, self.regions))

        if self.form == "replace":
            return model.map_pixels(inputs, cut)
        return model.map_pixels(
            inputs.doubled(), lambda pixels, number: cut(pixels, number // 2) if number % 2 else pixels
        )


def contrasted(question: Looks, general: Looks) -> list[Tensor]:
    """A map for each image: ratios of attention, summed over layers and over tokens with the weights 1, 2, 3 ..."""
    steps = min(len(question.maps), len(general.maps))
    ratio = question.maps[:steps] / (general.maps[:steps] + 1e-8)  # [steps, layers, batch, visual]
    both = question.real[:steps] & general.real[:steps]
    weight = both * both.new_ones(both.shape).long().cumsum(0)  # [steps, batch]
    return question.on_grids((ratio.sum(1) * weight[..., None]).sum(0))
