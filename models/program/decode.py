"""Decoding: the one loop that generates, with as many streams as the program's logits ops ask for."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from vlm.models.base import BaseVlm
from vlm.models.errors import ModelError
from vlm.models.program.control import Decode
from vlm.models.program.program import Cascade, Control, Program, Rewrite
from vlm.models.program.run import Run
from vlm.models.program.search import Pick, Prompts, Search
from vlm.models.program.streams import Streams, open_streams

__all__ = ["Decoder", "check_decoder", "generate", "open_streams"]

MIX = -0x61C8864680B583EB  # an odd number, so that products of it with 1, 2, 3 ... differ in all their bits


class Decoder(Protocol):
    """A way to choose tokens: a frozen dataclass in a file of ``models/decoders``; its fields are its recipe options.

    beams: whether several hypotheses of a prompt compete.
    """

    beams: ClassVar[bool]

    def begin(self, prompts: Prompts) -> Search: ...


def check_decoder(program: Program, decoder: Decoder | None) -> None:
    """Refuse a program whose decode controller needs beams, or one text, for a decoder that has none. Raises
    ModelError."""
    found = "greedy" if decoder is None else type(decoder).__name__.lower()
    beams = decoder is not None and decoder.beams
    for op in (op for _, op in program if isinstance(op, Control)):
        if op.beams and not beams:
            expected = "ranks the beams of a beam search; expected decode: beam"
            raise ModelError(f"decode: this method {expected}, found {found}")
        if beams and not op.beams:
            expected = "watches one text as it grows; expected decode: greedy or sample"
            raise ModelError(f"decode: this method {expected}, found {found}")


@torch.inference_mode()
def generate(
    model: BaseVlm,
    inputs: Any,
    *,
    max_new_tokens: int,
    stop: int,
    decoder: Decoder | None = None,
    subset: Callable[[Sequence[int]], Any] | None = None,
) -> list[list[int]]:
    """Continue each prompt until ``stop`` or ``max_new_tokens`` tokens; ``stop`` itself is not returned.

    Runs under the program that is attached to ``model``. Every stream has its own cache; all get the tokens
    chosen from the rewritten logits. Without a ``decoder``, decoding is greedy. subset: the inputs of some of the
    prompts, by their numbers in order; a program that lets another model answer some of a batch needs it.

    Raises ModelError when the program's decode controller does not go with the decoder.
    """
    engine = model.engine
    if engine is not None:
        check_decoder(engine.program, decoder)
    cascade = None if engine is None else next((op for _, op in engine.program if isinstance(op, Cascade)), None)
    if engine is None or cascade is None:
        return _generate(model, inputs, max_new_tokens, stop, decoder)
    answers, stands = cascade.answer(inputs, max_new_tokens, stop)
    left = (~stands).nonzero()[:, 0]  # rows that are still to be answered
    engine.asked, engine.answered = engine.asked + len(answers), engine.answered + len(answers) - len(left)
    if not len(left):
        return answers
    if len(left) < len(answers):
        if subset is None:
            raise ModelError("decode: a first answer stood for some of the prompts; expected subset, found none")
        inputs = subset(left.tolist())
    cascade.pass_on(inputs, left)
    for row, answer in zip(left.tolist(), _generate(model, inputs, max_new_tokens, stop, decoder), strict=True):
        answers[row] = answer
    return answers


def _generate(model: BaseVlm, inputs: Any, max_new_tokens: int, stop: int, decoder: Decoder | None) -> list[list[int]]:
    engine = model.engine
    logits, opened = open_streams(model, inputs, stop)
    streams = Streams(model, logits, opened)
    run = streams.main.run

    def begin(rows: Int[Tensor, " rows"]) -> Search:
        seeds = lambda: row_seeds(inputs, run)[rows]  # noqa: E731
        prompts = Prompts(len(rows), stop, max_new_tokens, rows.device, seeds)
        return Pick(prompts) if decoder is None else decoder.begin(prompts)

    rows = torch.arange(len(inputs.tokens), device=inputs.tokens.device)
    if engine is None or engine.control is None:
        return _continue(streams, begin(rows), engine.rewrites if engine is not None else [])
    # A controller goes back in one prompt at a time, so each is decoded by itself once all have been run.
    alone = ((streams.take_rows(row[None], remember=True), begin(row[None])) for row in rows)
    each = (_continue(one, search, engine.rewrites, engine.control) for one, search in alone)
    return [answer for answers in each for answer in answers]


def _continue(
    streams: Streams, search: Search, rewrites: Sequence[Rewrite], control: Control | None = None
) -> list[list[int]]:
    if search.width > 1:
        rows = torch.arange(len(streams.logits["main"]), device=streams.logits["main"].device)
        streams = streams.take_rows(rows.repeat_interleave(search.width), remember=control is not None)
    decode = Decode(streams, search)
    controller = None if control is None else control.begin(decode)
    while True:
        scores = search.score(streams.rewritten(rewrites))
        move = search.advance(scores) if controller is None else decode.choose(controller, scores)
        if move is None:
            continue
        if search.finished:
            return search.answers()
        if move.rows is not None:
            streams.reorder(move.rows)
        streams.step(move.tokens)


def row_seeds(inputs: Any, run: Run) -> Int[Tensor, " batch"]:
    """An integer of each prompt's text and pixels, whatever else is in the batch."""
    place = inputs.valid.long().cumsum(1)  # 1, 2, 3 ... over the tokens of each row
    text = ((inputs.tokens + 2) * place * MIX).masked_fill(~inputs.valid, 0).sum(1)
    return text + run.segment_seed(run.layouts[0])
