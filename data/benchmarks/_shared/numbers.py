r"""Numbers as answers spell them: digits, LaTeX (`\frac{3}{4}`, `2\sqrt{3}`, `50\%`), English words.

Enough to tell whether two short answers are one number; nothing is solved or simplified.
"""

from __future__ import annotations

import math
import re

_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SMALL = {word: number for number, word in enumerate(_UNITS)} | {w: 20 + 10 * k for k, w in enumerate(_TENS)}
_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_TOKEN = re.compile(r"\s*(\\[dt]?frac|\\sqrt|\\pi|\\times|\\cdot|\\div|\d+(?:\.\d+)?|\.\d+|[-+*/^(){}])")


def number_in_words(text: str) -> int | None:
    """The number that English words spell, other words left aside; None where no word is a number.

    >>> [number_in_words(text) for text in ("three", "Two hundred and forty-one", "many")]
    [3, 241, None]
    """
    words = [
        word for word in re.findall(r"[a-z]+", text.lower()) if word in _SMALL or word in _LARGE or word == "hundred"
    ]
    total = group = 0
    for word in words:
        if word == "hundred":
            group = max(group, 1) * 100
        elif word in _LARGE:
            total, group = total + max(group, 1) * _LARGE[word], 0
        else:
            group += _SMALL[word]
    return total + group if words else None


def number_in_latex(text: str) -> float | None:
    r"""The value of digits, signs, fractions, roots, powers and pi; None where anything else is left.

    >>> [number_in_latex(text) for text in (r"\frac{3}{4}", r"$2\sqrt{9}$", "1,250", "x + 1")]
    [0.75, 6.0, 1250.0, None]
    """
    bare = text.strip().replace("\\left", "").replace("\\right", "").replace("\\!", "").replace("\\,", "")
    for mark in ("$", "\\(", "\\)", "\\[", "\\]"):
        bare = bare.replace(mark, "")
    bare = re.sub(r"(?<=\d),(?=\d{3}\b)", "", bare).strip().rstrip(".")
    bare = re.sub(r"(\\[dt]?frac)\s*(\d)\s*(\d)", r"\1{\2}{\3}", bare)  # without braces, single digits are meant
    percent = re.fullmatch(r"(.*?)\s*\\?%", bare)
    tokens = _tokens(percent[1] if percent else bare)
    if not tokens:
        return None
    try:
        value = _Reader(tokens).whole()
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return value / 100 if percent else value


def _tokens(text: str) -> list[str]:
    """The tokens of an expression, none at all where it holds anything unknown."""
    found, place = [], 0
    while place < len(text.rstrip()):
        match = _TOKEN.match(text, place)
        if match is None:
            return []
        found.append(match[1])
        place = match.end()
    return found


class _Reader:
    """Recursive descent: sum of products of powers. Raises ValueError where the expression is malformed."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.place = tokens, 0

    @property
    def next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.next
        if not token or (expected and token not in expected):
            raise ValueError(token)
        self.place += 1
        return token

    def whole(self) -> float:
        value = self.sum()
        if self.next:
            raise ValueError(self.next)
        return value

    def sum(self) -> float:
        value = self.product()
        while self.next in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> float:
        value = self.power()
        while self.next and self.next not in ("+", "-", ")", "}"):
            if self.next in ("/", "\\div"):
                self.take()
                value /= self.power()
            else:  # a sign, or nothing between the factors
                if self.next in ("*", "\\times", "\\cdot"):
                    self.take()
                value *= self.power()
        return value

    def power(self) -> float:
        if self.next in ("+", "-"):
            return -self.power() if self.take() == "-" else self.power()
        value = self.atom()
        if self.next == "^":
            self.take()
            exponent = self.power()
            if abs(exponent) > 64 or (value < 0 and exponent != int(exponent)):
                raise ValueError("^")
            value = value**exponent
        return value

    def atom(self) -> float:
        token = self.take()
        if token in ("(", "{"):
            value = self.sum()
            self.take(")" if token == "(" else "}")
            return value
        if token.endswith("frac"):
            return self.atom() / self.atom()
        if token == "\\sqrt":
            return math.sqrt(self.atom())
        return math.pi if token == "\\pi" else float(token)
