"""How many visual tokens a pruner may keep."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

Meaning = Literal["final", "after_layer", "average", "flops", "kv_bytes"]


@dataclass(frozen=True)
class Budget:
    """A share of the visual tokens of each image, or a number of tokens for each image.

    In a recipe ``25%``, ``0.25``, ``100%`` and ``1.0`` are shares; ``64`` and ``1`` are token counts. Both mean the
    tokens that are left after the last cut. Other meanings are named: ``{average: 192}`` tokens over the decoder's
    layers, ``{after_layer: 64}`` after the first cut, ``{flops: 40%}`` and ``{kv_bytes: 30%}`` of an unpruned prompt
    (numbers are multiply-accumulates and bytes).
    """

    ratio: float | None = None
    tokens: int | None = None
    meaning: Meaning = "final"

    @classmethod
    def parse(cls, value: "str | int | float | Mapping[str, Any] | Budget") -> "Budget":
        """Read a recipe value. Raises ValueError for anything but a share in (0, 1] or a positive count."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, Mapping):
            meanings: tuple[Meaning, ...] = get_args(Meaning)
            found: list[Meaning] = [meaning for meaning in meanings if meaning in value]
            if len(value) != 1 or not found:
                raise ValueError(f"expected one of {', '.join(meanings)} and its value; found {dict(value)!r}")
            plain = cls.parse(value[found[0]])
            return cls(plain.ratio, plain.tokens, found[0])
        text = str(value).strip()
        try:
            if text.endswith("%"):
                share = float(text[:-1]) / 100
            elif text.lstrip("+-").isdigit():
                if int(text) < 1:
                    raise ValueError
                return cls(tokens=int(text))
            else:
                share = float(text)
            if not 0 < share <= 1:
                raise ValueError
        except ValueError:
            expected = "a share such as 25% or 0.25, or a number of tokens such as 64"
            raise ValueError(f"expected {expected}; found {value!r}") from None
        return cls(ratio=share)

    @property
    def everything(self) -> bool:
        """True when it keeps all tokens whatever their number."""
        return self.ratio == 1

    def of(self, tokens: int, images: int = 1) -> int:
        """Tokens to keep of ``tokens`` tokens of ``images`` images: at least one, at most all.

        A budget of 0 tokens, which no recipe can say, keeps none.
        """
        wanted = images * self.tokens if self.tokens is not None else round(tokens * (self.ratio or 1.0))
        return min(max(wanted, 0 if self.tokens == 0 else 1), tokens)

    def count(self, tokens: Int[Tensor, " segments"], images: Int[Tensor, " segments"]) -> Int[Tensor, " segments"]:
        """Tokens to keep in each segment that has ``tokens`` tokens of ``images`` images: at least one, at most all."""
        pairs = torch.stack([tokens, images], 1).tolist()  # both at once: it waits for the GPU
        return tokens.new_tensor([self.of(*pair) for pair in pairs])

    def __str__(self) -> str:
        amount = f"{self.tokens}" if self.tokens is not None else f"{100 * (self.ratio or 0):g}%"
        return amount if self.meaning == "final" else f"{self.meaning} {amount}"
