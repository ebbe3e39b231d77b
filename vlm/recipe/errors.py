"""The one error of a recipe that a user can cause, and the way every message names a near miss."""

from collections.abc import Iterable
from difflib import get_close_matches


class RecipeError(ValueError):
    """A recipe, override or method option that does not fit. One line: where, what, expected, found."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'steps'?"`` when some known name is close to ``name``, else an empty string."""
    lower = {candidate.lower(): candidate for candidate in known}
    match = get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f"; did you mean '{lower[match[0]]}'?" if match else ""


def unknown(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that does not exist: ``is unknown; did you mean ...? Known: ...``."""
    known = list(known)
    hint = nearest(name, known) or "."
    return f"is unknown{hint} Known: {', '.join(sorted(known)) or 'none'}"
