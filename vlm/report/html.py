"""Markup that is escaped by construction: only what ``tag`` made is taken as markup, every other string is text."""

from collections.abc import Iterable
from html import escape

VOID = frozenset({"br", "meta"})


class Html(str):
    """A string that is markup already. Joining or adding it to plain strings gives plain text again."""

    __slots__ = ()


def text(child: str) -> Html:
    """``child`` as markup: escaped unless it is markup already."""
    return child if isinstance(child, Html) else Html(escape(child))


def join(children: Iterable[str]) -> Html:
    """The children one after the other, each escaped unless it is markup."""
    return Html("".join(text(child) for child in children))


def tag(name: str, /, *children: str, **attributes: object) -> Html:
    """One element. ``class_`` becomes ``class`` and ``stroke_width`` ``stroke-width``.

    An attribute that is None or False is left out, one that is True stands without a value.
    """
    written = "".join(_attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    end = "" if name in VOID else f"</{name}>"
    return Html(f"<{name}{written}>{join(children)}{end}")


def _attribute(name: str, value: object) -> str:
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
