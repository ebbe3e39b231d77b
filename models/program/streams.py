"""The streams of a decode: one for the prompts as they are and one for each other context that a program asks for.

They get the same tokens, and reordering, looking ahead and going back happen to all of them, whatever they hold.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.models.base import BaseVlm, Stream
from vlm.models.errors import ModelError
from vlm.models.program.contexts import MAIN, Context
from vlm.models.program.program import Now, Rewrite
from vlm.models.program.signals import Signal

Logits = Mapping[str, Float[Tensor, "rows vocab"]]


def open_streams(
    model: BaseVlm, inputs: Any, stop: int = -1
) -> tuple[dict[str, Float[Tensor, "batch vocab"]], dict[str, Stream]]:
    """Prepare the prompts and run them through every stream that the attached program asks for.

    stop: the token that ends an answer, -1 for none. Returns next-token logits and stream by name; ``"main"`` is always
    there.
    """
    rewrites = model.engine.rewrites if model.engine is not None else []
    for op in model.engine.prepares if model.engine is not None else []:
        inputs = op.change(model, inputs, stop)
    logits, main = model.prefill(inputs)
    main.run.first = logits
    opened = {MAIN: (logits, main)}
    for context in dict.fromkeys(context for op in rewrites for context in op.streams):
        changed = context.inputs(model, inputs, main.run)
        opened[context.name] = model.prefill(changed, context.name)
    return {name: found for name, (found, _) in opened.items()}, {name: stream for name, (_, stream) in opened.items()}


class Streams:
    """The streams of a batch of prompts, the logits that they gave last, and the tokens they got since the prompt.

    remember: keep what the prompts gave, so that a decode can be taken back to its beginning.
    """

    def __init__(
        self, model: BaseVlm, logits: Logits, streams: Mapping[str, Stream], *, remember: bool = False
    ) -> None:
        self.model, self.logits, self.streams = model, logits, streams
        self._given: list[Int[Tensor, " rows"]] = []
        self._first = (logits, dict(self.main.run.inner)) if remember else None

    @property
    def main(self) -> Stream:
        return self.streams[MAIN]

    @property
    def length(self) -> int:
        """Tokens generated so far."""
        return len(self._given)

    def take_rows(self, index: Int[Tensor, " rows"], *, remember: bool = False) -> "Streams":
        """The streams of other rows (row i is row ``index[i]``), for prompts that have just been run."""
        assert not self._given
        logits = {name: value.index_select(0, index) for name, value in self.logits.items()}
        streams = {name: stream.take_rows(index) for name, stream in self.streams.items()}
        return Streams(self.model, logits, streams, remember=remember)

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Row i goes on from what row ``index[i]`` was."""
        self.streams = {name: stream.take_rows(index) for name, stream in self.streams.items()}
        self.logits = {name: value.index_select(0, index) for name, value in self.logits.items()}
        self._given = [tokens.index_select(0, index) for tokens in self._given]

    def step(self, tokens: Int[Tensor, " rows"]) -> None:
        """Give every stream one token for each row."""
        self.logits = {name: self.model.step(stream, tokens) for name, stream in self.streams.items()}
        self._given.append(tokens)

    def rewritten(self, rewrites: Sequence[Rewrite]) -> Float[Tensor, "rows vocab"]:
        """The main stream's logits after the program's stages, in their order."""
        main = self.logits[MAIN]
        for op in rewrites:
            main = op.logits(Now(main, self._other, self._inner, self.length, self.main.run.layouts[0]))
        return main

    def _other(self, context: Context) -> Float[Tensor, "rows vocab"]:
        return self.logits[context.name]

    def _inner(self, layers: int, normed: bool) -> Float[Tensor, "rows vocab"]:
        hidden, norm = self.main.run.inner[layers], getattr(self.model.decoder, "norm", None)
        if normed and norm is None:
            raise ModelError(f"logits: {type(self.model.decoder).__name__} has no final norm to read inner layers with")
        return self.model.logits(norm(hidden) if normed and norm is not None else hidden)

    def ahead(self, tokens: Int[Tensor, " rows"], signal: Signal) -> Tensor:
        """A signal of the main stream after one more token in each row; the token is taken back."""
        run = self.main.run
        run.stream = "ahead"  # for whoever listens to the main stream only
        self.model.step(self.main, tokens)
        run.stream = MAIN
        value = run.get(signal, signal.layer)
        self.main.truncate(1)
        return value

    def rewind(self, tokens: Int[Tensor, "rows generated"]) -> None:
        """Make the streams those of texts that begin otherwise: ``tokens`` since the prompt, rows of one prompt each.

        What the old and the new texts of all rows begin with alike stays in the caches; the rest is taken back and the
        new tokens are given one by one.
        """
        if tokens.shape[1] == 0:
            self._to_prompt()
            return
        old = torch.stack(self._given, 1) if self._given else tokens[:, :0]
        both = min(old.shape[1], tokens.shape[1])
        alike = (old[:, :both] == tokens[:, :both]).all(0).long().cumprod(0).sum() if both else 0
        keep = min(int(alike), tokens.shape[1] - 1)  # the last one is given again for its logits
        self._take_back(len(self._given) - keep)
        for token in tokens[:, keep:].unbind(1):
            self.step(token)

    def _to_prompt(self) -> None:
        assert self._first is not None
        self._take_back(len(self._given))
        self.logits, self.main.run.inner = self._first[0], dict(self._first[1])

    def _take_back(self, count: int) -> None:
        for stream in self.streams.values():
            stream.truncate(count)
        self._given = self._given[: len(self._given) - count]
