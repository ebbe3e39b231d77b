"""ICD: Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive Decoding (ACL 2024)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.contexts import Disturbed
from vlm.models.program.contrast import combine, contrast, keep_only, plausible
from vlm.models.program.program import LOGITS, Now, Program, Rewrite
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Icd:
    """What an instruction that disturbs the model makes likelier becomes less likely.

    The second prompt is the first with ``prefix`` put in.

    alpha: strength of the contrast (0 changes nothing). cut: as in VCD. prefix: the disturbing words; tokens: their
        token ids instead, for a model without its tokenizer. where: after the last ``image`` (a prompt without one is
        disturbed at its start), or at the ``start`` after the first token. form: ``vcd`` is (1 + alpha) l - alpha l',
        ``plain`` is l - alpha l'; ports of the method have both.
    """

    source: ClassVar[str] = "ICD (Findings of ACL 2024), section 4"
    verified: ClassVar[str] = "third-hand: prefix, where, form and defaults as in ports of it"

    alpha: float = 1.0
    cut: float = 0.1
    prefix: str = "You are a confused object detector."
    tokens: tuple[int, ...] = ()
    where: Literal["image", "start"] = "image"
    form: Literal["vcd", "plain"] = "vcd"

    def program(self, facts: Facts) -> Program:
        if self.alpha == 0:
            return ()
        if not self.tokens and facts.tokenize is None:
            raise ModelError(
                "icd.prefix: this model comes without its tokenizer; give ids as icd.tokens, or set model.tokenize"
            )
        ids = self.tokens or tuple(facts.tokenize(self.prefix) if facts.tokenize is not None else ())
        if not ids:
            raise ModelError(f"icd.prefix: expected words that disturb; found {self.prefix!r}, which is no token")
        disturbed = Disturbed(ids, self.where == "start")

        def logits(now: Now) -> Float[Tensor, "rows vocab"]:
            if self.form == "vcd":
                return contrast(now.main, now.other(disturbed), self.alpha, self.cut)
            return keep_only(combine(now.main, now.other(disturbed), -self.alpha), plausible(now.main, self.cut))

        return ((LOGITS, Rewrite(logits, (disturbed,))),)
