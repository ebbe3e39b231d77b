"""How the next token is chosen: one row for each prompt (greedy, sampled), or several that compete (beams).

A search is told the scores of all tokens for every row and says how each row goes on. What it remembers is its
``state``, a value that can be put back.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.contrast import keep_only, largest, nucleus, wide


class Prompts(NamedTuple):
    """What a search starts with. seeds: gives an integer of each prompt's own text and pixels."""

    number: int
    stop: int
    limit: int
    device: torch.device
    seeds: Callable[[], Int[Tensor, " prompts"]]


class Move(NamedTuple):
    """The token that each row gets, and the row that it continues (None: its own)."""

    tokens: Int[Tensor, " rows"]
    rows: Int[Tensor, " rows"] | None = None


class Search(Protocol):
    """width: rows of each prompt."""

    width: int
    state: Any

    def score(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """What is compared: logits, or their log-probabilities."""
        ...

    def advance(self, scores: Float[Tensor, "rows vocab"]) -> Move: ...

    @property
    def finished(self) -> bool: ...

    @property
    def tokens(self) -> Int[Tensor, "rows generated"]:
        """The tokens of every row so far."""
        ...

    def answers(self) -> list[list[int]]: ...


class Pick:
    """One row for each prompt; ``choose(logits, step)`` gives its next token. A row that has stopped stays stopped."""

    width = 1

    def __init__(
        self, prompts: Prompts, choose: Callable[[Float[Tensor, "rows vocab"], int], Int[Tensor, " rows"]] | None = None
    ) -> None:
        self.stop, self.limit = prompts.stop, prompts.limit
        self.choose = choose or (lambda logits, step: logits.argmax(-1))
        done = torch.zeros(prompts.number, dtype=torch.bool, device=prompts.device)
        self.state: tuple[tuple[Int[Tensor, " rows"], ...], Bool[Tensor, " rows"]] = ((), done)

    def score(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        return logits

    def advance(self, scores: Float[Tensor, "rows vocab"]) -> Move:
        chosen, done = self.state
        token = self.choose(scores, len(chosen)).masked_fill(done, self.stop)
        self.state = (*chosen, token), done | (token == self.stop)
        return Move(token)

    @property
    def finished(self) -> bool:
        chosen, done = self.state
        return len(chosen) >= self.limit or bool(done.all())

    @property
    def tokens(self) -> Int[Tensor, "rows generated"]:
        chosen, done = self.state
        return torch.stack(chosen, 1) if chosen else done.long().new_empty(len(done), 0)

    def answers(self) -> list[list[int]]:
        return [until(row, self.stop) for row in self.tokens.tolist()]


def until(tokens: list[int], stop: int) -> list[int]:
    """The tokens before ``stop``."""
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


def draws(prompts: Prompts, seed: int) -> Float[Tensor, "prompts steps"]:
    """A number from 0 to 1 for each step of each prompt, from a generator of the prompt's own.

    It goes by ``seed``, the prompt's text and pixels, and so depends neither on the batch nor on the device.
    """
    rows = []
    for own in prompts.seeds().tolist():
        generator = torch.Generator().manual_seed((own + seed * 0x9E3779B97F4A7C15) % 2**63)
        rows.append(torch.rand(prompts.limit, generator=generator, dtype=torch.float64))
    return torch.stack(rows).to(prompts.device)


def drawn(logits: Float[Tensor, "rows vocab"], at: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The token at the quantile ``at`` of each row's distribution."""
    mass = logits.double().softmax(-1).cumsum(-1)
    total = mass[:, -1:]
    place = torch.minimum(at[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return (mass <= place).sum(-1)


def warped(
    logits: Float[Tensor, "rows vocab"], temperature: float, top_k: int | None, top_p: float
) -> Float[Tensor, "rows vocab"]:
    """Logits over ``temperature``; then the ``top_k`` likeliest tokens; of those the nucleus of mass ``top_p``."""
    logits = wide(logits) / temperature
    if top_k is not None:
        logits = keep_only(logits, largest(logits, top_k))
    return keep_only(logits, nucleus(logits, top_p)) if top_p < 1 else logits


class Beams(NamedTuple):
    """The state of a beam search: hypotheses that grow, and the best that have ended (padded with the stop token)."""

    tokens: Int[Tensor, "prompts beams generated"]
    score: Float[Tensor, "prompts beams"]
    ended: Int[Tensor, "prompts beams generated"]
    ended_score: Float[Tensor, "prompts beams"]
    real: Bool[Tensor, "prompts beams"]
    open: Bool[Tensor, " prompts"]


class BeamSearch:
    """Beam search as Transformers has it, with its length penalty and its rules for stopping.

    A hypothesis of n tokens, the stop token among them, that has the log-probability s is worth ``s / n **
    length_penalty``. early: True stops when as many have ended as there are beams; False also when the best beam, at
    its present length, is worth less than these; "never" only when it can become worth no more.
    """

    def __init__(self, prompts: Prompts, beams: int, length_penalty: float, early: bool | Literal["never"]) -> None:
        self.width, self.power, self.early = beams, length_penalty, early
        self.stop, self.limit = prompts.stop, prompts.limit
        shape = (prompts.number, beams)
        score = torch.full(shape, -torch.inf, device=prompts.device)
        tokens = torch.empty(*shape, 0, dtype=torch.long, device=prompts.device)
        nothing = torch.zeros(shape, dtype=torch.bool, device=prompts.device)
        # All beams of a prompt begin alike, so only the first counts.
        begun = score.index_fill(1, torch.zeros(1, dtype=torch.long, device=score.device), 0.0)
        self.state = Beams(tokens, begun, tokens, score, nothing, ~nothing[:, 0])

    def score(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        return wide(logits).log_softmax(-1)

    def advance(self, scores: Float[Tensor, "rows vocab"]) -> Move:
        now, vocabulary = self.state, scores.shape[-1]
        length = now.tokens.shape[2] + 1
        total = now.score[..., None] + scores.unflatten(0, now.score.shape)  # [B,K,V]
        # Twice the beams: as many may end here as there are beams, and as many must go on.
        best, place = total.flatten(1).topk(min(2 * self.width, total.shape[1] * vocabulary), dim=1)
        source, token = place // vocabulary, place % vocabulary
        ends = (token == self.stop) | (length >= self.limit)
        tokens = torch.cat([_at(now.tokens, source), token[..., None]], 2)
        ended = self._end(now, best, tokens, ends, length)
        score, on = best.masked_fill(ends, -torch.inf).topk(self.width, dim=1)
        following = Beams(_at(tokens, on), score, *ended, now.open)
        self.state = following._replace(open=now.open & self._can_improve(following, length))
        first = torch.arange(len(on), device=on.device)[:, None] * self.width
        return Move(following.tokens[..., -1].flatten(), (source.gather(1, on) + first).flatten())

    def _end(
        self, now: Beams, best: Tensor, tokens: Tensor, ends: Tensor, length: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best hypotheses that have ended, those that end now among them: tokens, scores, whether there are any."""
        fresh = ends & now.open[:, None] & (best > -torch.inf)
        fresh[:, self.width :] = False  # the others are there only so that enough beams go on
        if self.early is True:
            fresh &= ~now.real.all(1, keepdim=True)
        worth = (best / length**self.power).masked_fill(~fresh, -torch.inf)
        old = torch.nn.functional.pad(now.ended, (0, 1), value=self.stop)
        score, chosen = torch.cat([now.ended_score, worth], 1).topk(self.width, dim=1)
        return (
            _at(torch.cat([old, tokens], 1), chosen),
            score,
            torch.cat([now.real, fresh], 1).gather(1, chosen),
        )

    def _can_improve(self, after: Beams, length: int) -> Bool[Tensor, " prompts"]:
        reach = self.limit if self.early == "never" and self.power > 0 else length
        hope = after.score[:, 0] / reach**self.power
        return (hope > -torch.inf) & (~after.real.all(1) | (hope > after.ended_score.amin(1)))

    @property
    def finished(self) -> bool:
        now = self.state
        over = now.tokens.shape[2] >= self.limit or not bool(now.open.any())
        return over or (self.early is True and bool(now.real.all()))

    @property
    def tokens(self) -> Int[Tensor, "rows generated"]:
        return self.state.tokens.flatten(0, 1)

    def answers(self) -> list[list[int]]:
        return [until(row, self.stop) for row in self.state.ended[:, 0].tolist()]


def _at(tokens: Int[Tensor, "prompts some generated"], index: Int[Tensor, "prompts chosen"]) -> Tensor:
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
