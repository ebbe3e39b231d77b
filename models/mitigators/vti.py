"""VTI: Reducing Hallucinations in Vision-Language Models via Latent Space Steering (ICLR 2025)."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.artifact import AUTO, Artifact, Calibration
from vlm.models.program.program import Edit, EditBlock, Keys, Program, resid, vit_resid
from vlm.models.program.signals import Facts, encoder_of
from vlm.models.program.steer import masking_change, principal, text_change, turned
from vlm.models.program.tune import Material, Tick

STEP = 0.1  # length of a step for a strength of 1, where x has length 1


@dataclass(frozen=True)
class Vti:
    """What MLPs add is turned along fixed directions: steadier features in the encoder, true captions in the decoder.

        x' = |x| normalize(x / |x| + 0.1 alpha v / |v|)

    The encoder's v, one for each block and token, is how the states of pictures of which almost all is blank, averaged
    over random maskings, differ from those of the pictures; the decoder's, one for each layer, how the last token's
    state after a true caption differs from that after a made-up one. Both over some captioned pictures: mean plus first
    principal component. Made-up captions are answers that the data reject, else the true ones with other objects.

    alpha_image, alpha_text: strengths; 0 leaves that side alone. mask_ratio: share of the patches that is blank. masks:
        maskings of each picture. calibration: `vlm calibrate` finds the directions (``auto``), or a file.
    """

    source: ClassVar[str] = "VTI (arXiv 2410.15778), section 4 and official code"
    verified: ClassVar[str] = (
        "code by specification, numbers not reproduced; made-up captions, maskings, side of the component: ours"
    )

    alpha_image: float = 0.9
    alpha_text: float = 0.9
    mask_ratio: float = 0.99
    masks: int = 20
    calibration: Calibration = AUTO

    def program(self, facts: Facts) -> Program:
        for name, value, most in (("mask_ratio", self.mask_ratio, 1.0), ("masks", self.masks, torch.inf)):
            if not 0 < value <= most:
                raise ModelError(f"vti.{name}: expected more than 0 and at most {most:g}; found {value:g}")
        if not self.alpha_image and not self.alpha_text:
            return ()
        blocks = self._blocks(facts)
        like = {"text": torch.ones(facts.layers, facts.width), "image": torch.ones(blocks, 1, 1)}
        found = self.calibration.load(facts, "vti", self.settings, Artifact(like, {}), "calibration")
        program: Program = ()
        if self.alpha_image:
            image = found.get("image", (blocks, None, None), "vti")
            program += tuple((vit_resid(n), EditBlock(partial(self._steady, v))) for n, v in enumerate(image))
        if self.alpha_text:
            text = found.get("text", (facts.layers, facts.width), "vti")
            program += tuple((resid(n), Edit(partial(self._true, v))) for n, v in enumerate(text))
        return program

    def _blocks(self, facts: Facts) -> int:
        """Blocks of the encoder that are steered. Raises ModelError for one that does not show them."""
        if not self.alpha_image:
            return 0
        blocks, why = encoder_of(facts, "vti.alpha_image").blocks, facts.refuses.get("vit.resid")
        if not blocks or why:
            raise ModelError(f"vti.alpha_image: {why or 'this vision encoder shows no blocks'}; set alpha_image: 0")
        return blocks

    @property
    def settings(self) -> dict[str, object]:
        """What a calibration's result depends on."""
        image = (self.mask_ratio, self.masks) if self.alpha_image else None
        return {"image": image, "text": bool(self.alpha_text)}

    def calibrate(self, model: Any, material: Material, tick: Tick) -> Artifact:
        """The directions of both sides, of those that are steered."""
        described = material.described
        image: list[Tensor] = []  # [views, blocks, tokens, width]
        text: list[Tensor] = []  # [samples, layers, width]
        for number, (inputs, right, wrong) in enumerate(described):
            if self.alpha_image:
                image.append(masking_change(model, inputs, self.mask_ratio, self.masks).cpu())
            if self.alpha_text and (known := torch.tensor([bool(words) for words in wrong])).any():
                text.append(text_change(model, inputs, right, wrong).cpu()[known])
            tick(number + 1, len(described))
        if self.alpha_text and not text:
            raise ModelError(
                "vti.alpha_text: expected captions whose objects are known (tags, named by the caption), or answers "
                "that are rejected; found none; set alpha_text: 0"
            )
        found = {"text": principal(torch.cat(text))} if text else {}
        if image:
            by_block = zip(*(part.unbind(1) for part in image), strict=True)  # one at a time: all are too many
            found["image"] = torch.stack([principal(torch.cat(parts)) for parts in by_block])
        return Artifact(found, {})

    def _true(
        self, direction: Float[Tensor, " width"], x: Float[Tensor, "batch rows width"], keys: Keys
    ) -> Float[Tensor, "batch rows width"]:
        return turned(x, direction.to(x.device)[None], STEP * self.alpha_text)

    def _steady(
        self, direction: Float[Tensor, "tokens width"], x: Float[Tensor, "views tokens width"]
    ) -> Float[Tensor, "views tokens width"]:
        if x.shape[1:] != direction.shape:
            raise ModelError(
                f"vti: expected states of {tuple(direction.shape)} tokens and width, as calibrated; found "
                f"{tuple(x.shape[1:])}; the encoder must take pictures of one size"
            )
        return turned(x.transpose(0, 1), direction.to(x.device), STEP * self.alpha_image).transpose(0, 1)
