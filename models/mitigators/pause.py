"""Pause tokens before the answer (SCA and CAB prompting were not to be found; this is the generic form)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vlm.models.errors import ModelError
from vlm.models.program.program import PROMPT, Prepare, Program
from vlm.models.program.prompts import last_place, words
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Pause:
    """A few more tokens of no meaning before the model must answer, so that it has more places to compute in.

    They are words of the vocabulary, so nothing is learned and caches are as ever. A model that has not been trained
    with pauses may well do worse.

    count: how many times ``text`` is put in (0 changes nothing). text: the pause; tokens: its token ids instead, for a
        model without its tokenizer. where: before the ``answer``, as the last thing of the prompt, or after the last
        ``image`` (a prompt without one then stays as it is).
    """

    source: ClassVar[str] = "pause prompting; the paper (SCA, CAB) was not located"
    verified: ClassVar[str] = "reconstruction"

    count: int = 8
    text: str = "[PAUSE]"
    tokens: tuple[int, ...] = ()
    where: Literal["answer", "image"] = "answer"

    def program(self, facts: Facts) -> Program:
        if self.count < 0:
            raise ModelError(f"pause.count: expected 0 or more; found {self.count}")
        if self.count == 0:
            return ()
        ids = words(facts, "pause.text", self.text, self.tokens) * self.count

        def change(model: Any, inputs: Any, stop: int) -> Any:
            at = last_place(inputs.valid if self.where == "answer" else inputs.visual)
            return inputs.edit([list(ids) if place >= 0 else [] for place in at.tolist()], at)

        return ((PROMPT, Prepare(change)),)
