"""Preference pairs: one sample as two sequences, with the answer to prefer and with the one to avoid.

Both have the same prompt over the same images; only the last answer is learned from, whatever came before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from vlm.data.batch import Batch, Example
from vlm.data.draw import Draw
from vlm.data.errors import DataError
from vlm.data.schema import Message, Sample, references


class PairEncoder:
    """Makes a pair of every sample: an example with `rejected`.

    Args:
        encoder: of single samples, a `ChatEncoder` or one with its fields; its `max_tokens` holds for each sequence,
            but a pair is never cut: one that is too long is a bad sample.
    """

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.max_tokens = copy(encoder), encoder.max_tokens
        self.encoder.max_tokens = None
        self.template, self.view = encoder.template, encoder.view

    def __call__(self, sample: Sample, draw: Draw) -> Example:
        """Encode a pair. Of several rejected answers it is the one whose turn it is in this epoch.

        Raises:
            DataError: no rejected answer, no answer to prefer, too many tokens, or what the encoder raises.
        """
        return self.pair(sample, draw.epoch % max(1, len(sample.rejected)), draw)

    def pair(self, sample: Sample, number: int, draw: Draw) -> Example:
        """The pair with rejected answer `number`; `rejected.key` names both. Raises DataError as a call does."""
        check_pair(sample)
        *before, last = sample.messages
        asked = [replace(message, loss=False) if message.role == "assistant" else message for message in before]
        chosen = self._encode(sample, [*asked, last], draw)
        rejected = self._encode(sample, [*asked, sample.rejected[number]], draw)
        shared = {name: getattr(chosen, name) for name in ("images", "tiles", "media") if hasattr(chosen, name)}
        return replace(chosen, rejected=replace(rejected, key=f"{sample.key}#{number}", **shared))

    def _encode(self, sample: Sample, messages: Sequence[Message], draw: Draw) -> Example:
        """One of the two. A draw of its own, so that both keep or drop their images."""
        turns = (*messages[:-1], replace(messages[-1], loss=True))
        one = replace(sample, messages=turns, rejected=())
        example = self.encoder(one, Draw(draw.position, draw.epoch, draw.seed))
        if self.max_tokens is not None and len(example.tokens) > self.max_tokens:
            raise DataError(
                f"sample {sample.key}: tokens: expected at most {self.max_tokens} in each answer of a pair, which is "
                f"never cut; found {len(example.tokens)}"
            )
        return example


class CollatePairs:
    """Makes a batch of pairs with a function that makes batches of examples. Picklable, for the workers of a stream."""

    def __init__(self, collate: Callable[[list[Example]], Batch]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """An example without a pair (a blank in place of an unreadable sample) stands on both sides."""
        chosen = self.collate(list(examples))
        rejected = self.collate([example.rejected or example for example in examples])
        shared = {name: getattr(chosen, name) for name in ("images", "media") if hasattr(chosen, name)}
        return replace(chosen, rejected=replace(rejected, **shared))


def check_pair(sample: Sample) -> None:
    """Refuse what is no preference pair. Raises DataError."""
    if not sample.rejected:
        raise DataError(f"sample {sample.key}: rejected: expected an answer to avoid, found none")
    if sample.messages[-1].role != "assistant":
        found = sample.messages[-1].role
        raise DataError(f"sample {sample.key}: messages: expected a last turn of the assistant, found one of {found}")
    last = sample.messages[-1]
    for number, message in enumerate(sample.rejected):
        if message.content == last.content:
            raise DataError(f"sample {sample.key}: rejected[{number}]: expected another answer than the last turn's")
        if references(message) != references(last):
            raise DataError(f"sample {sample.key}: rejected[{number}]: expected the images of the last turn, no others")
