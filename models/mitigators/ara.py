"""ARA: Alleviating Hallucination in Large Vision-Language Models with Active Retrieval Augmentation (2408.00555)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.artifact import AUTO, Artifact, Calibration
from vlm.models.program.program import LOGITS, Now, Program, Rewrite
from vlm.models.program.retrieval import WHO, Captions, Retrieved, encoder_of, image_features, mixed
from vlm.models.program.signals import Facts
from vlm.models.program.tune import Material, Tick


@dataclass(frozen=True)
class Ara:
    """Where the image hardly changes the first token, captions of similar pictures are read too, in a second prompt.

        p* = (1 - share) p(prompt) + share p(prompt with captions)

    Pictures are similar when the visual tokens that the model makes of them are (means, cosine). Of the paper's steps
    this has the trigger, the coarse retrieval of whole pictures and the fusion; retrieval by cropped objects and the
    ranking by a caption of one's own need a detector and further passes, and are left out.

    index: ``auto``: the captioned pictures of the recipe's training data, as its model sees them. Or a file that ``vlm
        data index-captions`` made with this model of a folder of pictures and captions. count:
        captions that are put in. below: retrieve when with and without the image differ by less, in nats (KL); which
        value asks for 30 to 60 % of the questions, as in the paper, is to be found for each model. share: weight of the
        second prompt (0 changes nothing). words: what introduces the captions.
    """

    source: ClassVar[str] = "ARA (arXiv 2408.00555), section 3; no released code"
    verified: ClassVar[str] = "reconstruction"

    index: Calibration = AUTO
    count: int = 3
    below: float = 0.5
    share: float = 0.5
    words: str = "Similar pictures show:"

    def program(self, facts: Facts) -> Program:
        if not 0 <= self.share < 1:
            raise ModelError(f"ara.share: expected a weight from 0 and below 1; found {self.share:g}")
        if self.count < 1:
            raise ModelError(f"ara.count: expected at least 1 caption; found {self.count}")
        if not self.share or self.below <= 0:
            return ()
        like = Captions(torch.zeros(1, 1), [""], "").artifact
        self.index.load(facts, WHO, self.settings, like, "index")
        path = self.index.path(facts, WHO, self.settings, "index")
        retrieved = Retrieved(str(path), self.count, self.below, self.words)

        def logits(now: Now) -> Float[Tensor, "rows vocab"]:
            return mixed(now.main, now.other(retrieved), self.share)

        return ((LOGITS, Rewrite(logits, (retrieved,))),)

    @property
    def settings(self) -> dict[str, object]:
        """What an index depends on, besides the model and the data."""
        return {}

    def calibrate(self, model: Any, material: Material, tick: Tick) -> Artifact:
        """The index of the data's captioned pictures."""
        features, texts = [], []
        for number, described in enumerate(material.captioned):
            features.append(image_features(model, described.inputs).cpu())
            texts += described.texts
            tick(number + 1, len(material.captioned))
        return Captions(torch.cat(features), texts, encoder_of(model)).artifact
