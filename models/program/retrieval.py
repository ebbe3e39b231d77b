"""Captions of other pictures that look like the one that is asked about: the index, the search, and their context.

Source: Active Retrieval Augmentation (arXiv 2408.00555), section 3; without released code.
"""

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.artifact import ANY, Artifact, contents, write
from vlm.models.program.contexts import Context
from vlm.models.program.contrast import wide
from vlm.models.program.observe import observe
from vlm.models.program.prompts import last_place
from vlm.models.program.run import Run
from vlm.models.roles import split

WHO = "ara"  # whose artifacts indexes are


class Captions(NamedTuple):
    """features: of each picture, as :func:`image_features` makes them. texts: its caption. encoder: whose features."""

    features: Float[Tensor, "pictures width"]
    texts: list[str]
    encoder: str

    @property
    def artifact(self) -> Artifact:
        """The index as a calibration keeps it."""
        about = {"encoder": self.encoder, "captions": json.dumps(list(self.texts), ensure_ascii=False)}
        return Artifact({"features": self.features}, about)

    def save(self, path: Path) -> None:
        """Write a file for any model of the same encoder."""
        tensors, about = self.artifact
        write(path, tensors, {"method": WHO, "weights": ANY, **about})

    def nearest(self, features: Float[Tensor, "images width"], count: int) -> list[str]:
        """The captions of the ``count`` pictures that are most like one of these images, best first, each text once.

        Likeness is the cosine of features from which the mean of the index is taken: what all pictures have in common
        says nothing.
        """
        mean = self.features.mean(0) if len(self.features) > 1 else torch.zeros_like(self.features[0])
        own, other = (torch.nn.functional.normalize(x - mean, dim=-1) for x in (self.features, features.to(mean)))
        order = (other @ own.T).amax(0).argsort(descending=True, stable=True).tolist()
        ranked: list[str] = [self.texts[place] for place in order]
        return list(dict.fromkeys(ranked))[:count]


def load_captions(path: str) -> Captions:
    """Raises ModelError for anything but an index of captions."""
    if not Path(path).is_file():
        raise ModelError(f"{path}: expected an index of captions (vlm data index-captions); found no file")
    return _load(path, Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _load(path: str, changed: int) -> Captions:
    found = contents(Path(path), "ara.index")
    if found.about.get("method") != WHO or "captions" not in found.about or "features" not in found.tensors:
        other = found.about.get("method", "another file")
        raise ModelError(f"{path}: expected an index of captions; found {other}")
    return Captions(found.tensors["features"], json.loads(found.about["captions"]), found.about["encoder"])


def encoder_of(model: Any) -> str:
    """A hash of the weights that make visual tokens, the same in any precision that is at least bfloat16."""
    digest = hashlib.sha256()
    parts = split(model, model.places)
    for role in ("vision", "connector"):
        for name, value in parts[role].named_parameters():
            some = value.detach().flatten()[:64].to(torch.bfloat16).view(torch.int16).cpu()
            digest.update(f"{name} {tuple(value.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def image_features(model: Any, inputs: Any) -> Float[Tensor, "images width"]:
    """The mean of each image's visual tokens, as they go into the language model; a program rests meanwhile."""
    with nullcontext() if model.engine is None else observe(model, lambda layer, seen: None):
        embeds, run = model._enter(inputs, None)
    layout = run.layouts[0]
    numbers = layout.image[layout.visual]  # of each visual token, row by row
    count = int(numbers.max()) + 1 if len(numbers) else 0
    total = embeds.new_zeros(count, embeds.shape[2]).float()
    total = total.index_add(0, numbers, embeds[layout.visual].float())
    return total / numbers.bincount(minlength=count)[:, None].clamp_min(1)


@dataclass(frozen=True)
class Retrieved(Context):
    """The prompts with captions of pictures like theirs, where the image says little about the answer.

    index: path of an index. count: captions that are put in after the last image, behind ``words``. below: a prompt is
    left as it is when the image changes the distribution of the first token by this many nats or more (Kullback-Leibler
    divergence of with and without).
    """

    alters: ClassVar[Literal["image", "text"]] = "text"

    index: str
    count: int
    below: float
    words: str

    def inputs(self, model: Any, inputs: Any, main: Run) -> Any:
        captions = load_captions(self.index)
        if captions.encoder != (own := encoder_of(model)):
            raise ModelError(
                f"{self.index}: expected an index of this model's encoder ({own}); found one of {captions.encoder}; "
                "make it anew with vlm data index-captions"
            )
        if model.tokenize is None:
            raise ModelError("ara: captions are text, and this model comes without its tokenizer; set model.tokenize")
        unsure = self.unsure(model, inputs, main)
        if not any(unsure):
            return inputs
        features, ids, first = image_features(model, inputs), [], 0
        for asks, number in zip(unsure, images_of(main), strict=True):
            found = captions.nearest(features[first : first + number], self.count) if asks else []
            ids.append(list(model.tokenize(" ".join([self.words, *found]))) if asks else [])
            first += number
        return inputs.edit(ids, last_place(inputs.visual))

    def unsure(self, model: Any, inputs: Any, main: Run) -> list[bool]:
        """Which rows have an image that says too little."""
        assert main.first is not None  # the prompts have been run
        blind, _ = model.prefill(inputs.without_images(), "without image")
        return (
            (shift(main.first, blind) < self.below) & torch.tensor(images_of(main), device=blind.device).bool()
        ).tolist()


def images_of(run: Run) -> list[int]:
    """How many images each row has."""
    layout = run.layouts[0]
    return [len(image[visual].unique()) for image, visual in zip(layout.image, layout.visual, strict=True)]


def shift(logits: Float[Tensor, "rows vocab"], without: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Kullback-Leibler divergence, in nats, of a distribution from another one."""
    p, q = wide(logits).log_softmax(-1), wide(without).log_softmax(-1)
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)


def mixed(
    logits: Float[Tensor, "rows vocab"], other: Float[Tensor, "rows vocab"], share: float
) -> Float[Tensor, "rows vocab"]:
    """Log-probabilities of a mixture in which ``other`` has the weight ``share``."""
    p, q = wide(logits).log_softmax(-1), wide(other).log_softmax(-1)
    weight = torch.tensor(share, dtype=p.dtype, device=p.device)
    return torch.logaddexp(p + torch.log1p(-weight), q + weight.log())
