"""Decode controllers: what may look ahead of a decode, change its scores and take it back.

A controller belongs to one prompt. At every length the loop first asks :meth:`Controller.score`; it may score what it
would see after a continuation (:meth:`Decode.ahead`), rule continuations out, or name a shorter length to go back to.
"""

from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.models.program.layout import Layout
from vlm.models.program.search import Move, Search
from vlm.models.program.signals import Signal
from vlm.models.program.streams import Streams


class Controller(Protocol):
    """state: what the controller knows of the hypotheses as they are; it is put back when the decode goes back. What
    must outlive that (what has been ruled out where) is kept elsewhere."""

    state: Any

    def score(self, scores: Float[Tensor, "rows vocab"]) -> tuple[Float[Tensor, "rows vocab"], int | None]:
        """The scores to choose by, and the number of generated tokens to go back to instead of choosing, if any."""
        ...

    def moved(self, move: Move) -> None:
        """Told how every row goes on; reorders what is kept by row."""
        ...


class Decode:
    """The decode of one prompt as its controller sees it, with the operations that a controller has."""

    def __init__(self, streams: Streams, search: Search) -> None:
        self._streams, self._search = streams, search
        self._before: list[tuple[Any, Any]] = []  # states of search and controller at each length

    @property
    def length(self) -> int:
        """Tokens generated so far."""
        return self._streams.length

    @property
    def layout(self) -> Layout:
        """Of the main stream's last layers; generated tokens are the last places."""
        return self._streams.main.run.last

    def signal(self, signal: Signal) -> Tensor:
        """A signal of the newest token's pass."""
        return self._streams.main.run.get(signal, signal.layer)

    def inner(self, layers: int) -> Float[Tensor, "rows width"]:
        """The newest token's state after so many decoder layers."""
        return self._streams.main.run.inner[layers]

    def ahead(self, tokens: Int[Tensor, " rows"], signal: Signal) -> Tensor:
        """The signal after one more token in each row, which is then taken back."""
        return self._streams.ahead(tokens, signal)

    def choose(self, controller: Controller, scores: Float[Tensor, "rows vocab"]) -> Move | None:
        """The next move under a controller; None when it went back, so that scores are to be made anew.

        After going back, search, controller and all streams are as they were at that length.
        """
        self._before[self.length :] = [(self._search.state, controller.state)]
        scores, back = controller.score(scores)
        if back is not None:
            self._search.state, controller.state = self._before[back]
            self._streams.rewind(self._search.tokens)
            return None
        move = self._search.advance(scores)
        controller.moved(move)
        return move


def bar(
    scores: Float[Tensor, "rows vocab"], rows: Int[Tensor, " picks"], tokens: Int[Tensor, " picks"], by: float
) -> Float[Tensor, "rows vocab"]:
    """Scores in which some tokens of some rows are worth less by ``by``."""
    return scores.index_put(
        (rows, tokens), torch.tensor(-by, dtype=scores.dtype, device=scores.device), accumulate=True
    )
