"""Over-trust: a token of the answer that everything after it attends to, and the decode controller that avoids it.

Source of all: OPERA (CVPR 2024), sections 3.2 and 3.3, and its official code.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.models.program.control import Decode, bar
from vlm.models.program.search import Move
from vlm.models.program.signals import Received

SHORT = 10  # tokens of an answer up to which its penalty is that the image goes unseen, and nothing is taken back
BARRED = 999.0  # log-probability that a token loses by being ruled out
MOST = 1e9  # of a column product: it grows with a power of the scale


def log_column_products(attention: Float[Tensor, "*batch rows keys"], scale: float) -> Float[Tensor, "*batch keys"]:
    """log of 1e-7 times the product of ``scale * attention`` down each column, from the diagonal on.

    attention: of the answer's rows to its own tokens, lower triangular.
    """
    rows, keys = attention.shape[-2:]
    below = torch.ones(rows, keys, dtype=torch.bool, device=attention.device).tril()
    logs = (scale * attention.double()).log().masked_fill(~below, 0.0)
    return logs.sum(-2) + torch.log(torch.tensor(1e-7, dtype=torch.float64, device=attention.device))


def over_trust(
    attention: Float[Tensor, "*batch rows keys"], on_image: Float[Tensor, "*batch"], scale: float
) -> tuple[Float[Tensor, "*batch"], Int[Tensor, "*batch"]]:
    """The penalty of an answer and the token that it leans on most.

    on_image: attention of the newest row to the image. While the answer is short, looking at the image is rewarded.
    """
    products = log_column_products(attention, scale)
    largest, place = products.max(-1)
    if attention.shape[-1] <= SHORT:
        return -on_image.double(), place
    return largest.exp().clamp_max(MOST), place


class History(NamedTuple):
    """attention: of every row of the answer so far to the answer's tokens. leant: the token that each beam leant on at
    each length."""

    attention: Float[Tensor, "beams rows keys"]
    leant: Int[Tensor, "beams lengths"]


class OverTrust:
    """Scores the continuations of one prompt's beams by their over-trust, and goes back from what they lean on.

    row: the attention of the newest row in the last layer, by head. The largest over heads counts, with rows of all
    keys scaled to sum 1. A length to which the search has gone back ``candidates`` times is used up: then the one
    before it is taken, and if that is used up too, the search goes on.
    """

    def __init__(
        self, decode: Decode, row: Received, candidates: int, scale: float, penalty: float, threshold: int | None
    ) -> None:
        self.decode, self.row, self.candidates = decode, row, candidates
        self.scale, self.penalty, self.threshold = scale, penalty, threshold
        self.state: History | None = None
        self._chosen: dict[int, Move] = {}  # what was chosen last at each length
        self._barred: dict[int, list[Move]] = {}  # what has been ruled out there, once for every time it came back

    def score(self, scores: Float[Tensor, "beams vocab"]) -> tuple[Float[Tensor, "beams vocab"], int | None]:
        length = self.decode.length
        history = self.state or History(
            scores.new_empty(len(scores), 0, 0), torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)
        )
        attention = history.attention
        if length:
            attention = grown(attention, self._newest(self.decode.signal(self.row), length)[0])
        for move in self._barred.get(length, []):
            assert move.rows is not None
            scores = bar(scores, move.rows, move.tokens, BARRED)
        penalty, leant, tried = self._try(scores, attention)
        most = leant.mode(1).values  # [beams] over their candidates
        if (back := self._back(history.leant, most, length)) is not None:
            self._barred.setdefault(back, []).append(self._chosen[back])
            return scores, back
        self.state = History(attention, torch.cat([history.leant, most[:, None]], 1))
        punished = scores.gather(1, tried) - self.penalty * penalty.to(scores)
        return (scores - BARRED).scatter(1, tried, punished), None

    def moved(self, move: Move) -> None:
        assert self.state is not None and move.rows is not None
        self._chosen[self.decode.length] = move
        self.state = History(*(part.index_select(0, move.rows) for part in self.state))

    def _try(
        self, scores: Tensor, attention: Tensor
    ) -> tuple[Float[Tensor, "beams tried"], Int[Tensor, "beams tried"], Int[Tensor, "beams tried"]]:
        """Penalty and place of each beam's likeliest tokens, by one pass ahead for each."""
        tokens = scores.topk(min(self.candidates, scores.shape[1]), dim=1).indices
        found = []
        for token in tokens.unbind(1):
            paid, on_image = self._newest(self.decode.ahead(token, self.row), self.decode.length + 1)
            found.append(over_trust(grown(attention, paid), on_image, self.scale))
        penalty, leant = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
        return penalty, leant, tokens

    def _newest(self, heads: Float[Tensor, "beams heads keys"], length: int) -> tuple[Tensor, Tensor]:
        """The newest row's attention to the answer's ``length`` tokens, itself among them, and to the image."""
        most = heads.amax(1)
        most = most / most.sum(-1, keepdim=True)  # [beams, keys]
        visual = self.decode.layout.visual
        visual = torch.nn.functional.pad(visual, (0, most.shape[1] - visual.shape[1]))  # a token ahead is no image
        return most[:, most.shape[1] - length :], (most * visual).sum(-1)

    def _back(self, history: Tensor, most: Tensor, length: int) -> int | None:
        """The length to go back to, if all beams keep leaning on one token."""
        if self.threshold is None:
            return None
        token = int(most.mode().values)
        often = ((history == token).sum(1) + (most == token)) > self.threshold
        if token < SHORT or not bool(often.all()):
            return None
        for target in (token + 1, token):
            if target < length and len(self._barred.get(target, [])) < self.candidates:
                return target
        return None


def grown(
    attention: Float[Tensor, "beams rows keys"], row: Float[Tensor, "beams longer"]
) -> Float[Tensor, "beams longer longer"]:
    """One more row of the answer's attention, which sees one more token."""
    return torch.cat([torch.nn.functional.pad(attention, (0, 1)), row[:, None]], 1)
