"""Which part of the picture a phrase of an answer is about, from the attention of its words' rows.

Source: after RefAM (arXiv 2509.22650), which finds in diffusion transformers that stop words act as magnets of
attention and filters them; carried over to a language model's rows here, so a reconstruction.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.looks import looks

# Words that say nothing about a picture; whatever attention they pay to it is not about what is in it.
_STOP_WORDS = """
a an the this that these those there here it its is are was were be been being has have had do does did of in on at by
to from with and or but as for into onto over under near next while which who whose where when so not no also very some
any each other than then he she they them his her their i you we
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


def magnets(words: Sequence[str]) -> list[bool]:
    """Which pieces of a text are stop words or no word at all."""
    bare = ["".join(letter for letter in word.lower() if letter.isalnum()) for word in words]
    return [not word or word in STOP_WORDS for word in bare]


def filtered(
    rows: Float[Tensor, "words visual"],
    magnet: Bool[Tensor, " words"],
    chosen: Bool[Tensor, " words"],
    tau: float = 4.0,
) -> Float[Tensor, " visual"]:
    """The map of the chosen words: mean over those that are no magnets, each with sum 1, without sinks.

    A sink is a visual token that gets more than ``tau`` times the mean of a token from the magnets (from all rows where
    there is none); it has 0. What the magnets see is then taken off, as far as it is there, because every row sees it.
    Raises ModelError where no chosen word is left.
    """
    content = chosen & ~magnet
    if not bool(content.any()):
        raise ModelError("grounding: expected a phrase with a word that says something; found stop words only")
    share = rows / rows.sum(1, keepdim=True).clamp_min(1e-12)
    common = share[magnet if bool(magnet.any()) else torch.ones_like(magnet)].mean(0)
    sink = common > tau * common.mean()
    found = share[content].mean(0)
    if bool(magnet.any()):
        found = (found - common).clamp_min(0)
    return found.masked_fill(sink, 0)


@torch.no_grad()
def grounding_maps(
    model: Any,
    inputs: Any,
    answer: Sequence[int],
    words: Sequence[str],
    chosen: Collection[int],
    layers: Collection[int] | None = None,
    tau: float = 4.0,
) -> list[Float[Tensor, "rows cols"]]:
    """A map of each image of one prompt: where the words ``chosen`` (their numbers) of an answer look.

    words: the text of each of the answer's tokens. layers: whose attention counts, its mean; the middle half of the
    decoder by default. One row for each token is read. Raises ModelError for a batch of several prompts, for a phrase
    of stop words, and where images are no grids.
    """
    if len(inputs.tokens) != 1:
        raise ModelError(f"grounding: expected one prompt; found {len(inputs.tokens)}")
    count = len(model.decoder.layers)
    wanted = range(count // 4, max(3 * count // 4, count // 4 + 1)) if layers is None else layers
    text = inputs.tokens.new_tensor([[*answer, 0]])  # one more step: the last word has a row of its own
    seen = looks(model, inputs, wanted, len(answer) + 1, answer=text)
    rows = seen.maps[1:, :, 0].mean(1)  # [words, visual]: a word's own row predicts what follows it
    magnet = torch.tensor(magnets(words), device=rows.device)
    marked = torch.tensor([number in chosen for number in range(len(words))], device=rows.device)
    return seen.on_grids(filtered(rows, magnet, marked, tau)[None])
