"""Numbers, shares and durations as people write them: ``8k``, ``300M``, ``20%``, ``2e-6``, ``2h``.

A YAML reader guesses types: PyYAML takes ``2e-6`` for text, ``on`` for true, ``1:30`` for 90 and ``012`` for 10.
Here a scalar stays the text that was written until the declared type of its key says what it is; what does not
fit is refused. Every function takes that text or an already typed Python value and raises ValueError with the
end of a sentence ("must be ..., found ...") that the caller starts with the key.
"""

import math
import re
from fractions import Fraction
from typing import Any

_PLAIN_NUMBER = r"[-+]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)"
_INTEGER = re.compile(r"[-+]?(?:0|[1-9]\d*)")
_NUMBER = re.compile(rf"{_PLAIN_NUMBER}(?:[eE][-+]?\d+)?")
_COUNT = re.compile(rf"({_PLAIN_NUMBER})([kMBT]?)")
_PERCENT = re.compile(rf"({_PLAIN_NUMBER})\s?%")
_DURATION = re.compile(rf"({_PLAIN_NUMBER})\s?([hms])")

_MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SECONDS = {"h": 3600, "m": 60, "s": 1}


def found(value: Any) -> str:
    """How a message shows what stood in the recipe."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return repr(str(value)) if isinstance(value, str) else str(value)


def parse_bool(value: Any) -> bool:
    """``true`` or ``false``; the other words of YAML 1.1 (on, yes, ...) are refused."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value in ("true", "false"):
        return value == "true"
    raise ValueError(f"must be true or false, found {found(value)}")


def parse_int(value: Any) -> int:
    """A whole number; ``k``, ``M``, ``B`` and ``T`` are powers of a thousand, so ``1.5k`` is 1500."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _COUNT.fullmatch(value) if isinstance(value, str) else None
    if match and (match[2] or _INTEGER.fullmatch(match[1])):
        number = Fraction(match[1]) * _MULTIPLES[match[2]]
        if number.denominator == 1:
            return int(number)
    raise ValueError(f"must be a whole number such as 20 or 8k, found {found(value)}")


def parse_float(value: Any) -> float:
    """A finite number; ``25%`` is 0.25."""
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str) and (match := _PERCENT.fullmatch(value)):
        number = float(Fraction(match[1]) / 100)
    elif isinstance(value, str) and _NUMBER.fullmatch(value):
        number = float(value)
    if math.isfinite(number):
        return number
    raise ValueError(f"must be a number such as 0.1 or 2e-6, found {found(value)}")


def parse_ratio(value: Any) -> float:
    """A share between 0 and 1, written ``20%`` or ``0.2``."""
    try:
        number = parse_float(value)
    except ValueError:
        number = math.nan
    if 0 <= number <= 1:
        return number
    raise ValueError(f"must be a share from 0 to 1 such as 20% or 0.2, found {found(value)}")


def parse_steps_or_ratio(value: Any) -> int | float:
    """A number of steps (``100``, ``2k``) as an int, or a share of all steps (``3%``, ``0.03``) as a float."""
    for parse in (parse_int, parse_ratio):
        try:
            number = parse(value)
        except ValueError:
            continue
        if number >= 0:
            return number
    raise ValueError(f"must be a number of steps such as 100 or a share such as 3%, found {found(value)}")


def parse_seconds(value: Any) -> float:
    """A duration in seconds, always written with its unit: ``2h``, ``30m``, ``10s``."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match and not match[1].startswith("-"):
        return float(Fraction(match[1]) * _SECONDS[match[2]])
    raise ValueError(f"must be a duration such as 2h, 30m or 10s, found {found(value)}")


def parse_str(value: Any) -> str:
    """The text as it was written, whatever it looks like: ``on`` and ``012`` stay ``on`` and ``012``."""
    if isinstance(value, str):
        return str(value)
    raise ValueError(f"must be text, found {found(value)}")


def natural(value: Any) -> Any:
    """Untyped recipe values as JSON would have them: plain scalars become null, bool, int, float or text.

    For keys whose type we do not declare (a Hugging Face config) and for records of a run. Quoted text stays text.
    """
    if isinstance(value, dict):
        return {str(key): natural(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [natural(item) for item in value]
    if not isinstance(value, str) or getattr(value, "quoted", False):
        return str(value) if isinstance(value, str) else value
    if value in ("true", "false"):
        return value == "true"
    if _INTEGER.fullmatch(value):
        return int(value)
    if _NUMBER.fullmatch(value) and math.isfinite(float(value)):
        return float(value)
    return str(value)
