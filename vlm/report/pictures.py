"""Pictures: what each method kept of an image, where its answer looked, and which words it invented.

The bytes of an image stand once in the page; every drawing of it refers to that one (``<use>``), which also keeps a
report of many methods small.
"""

from collections.abc import Iterable

from vlm.report.html import Html, join, tag
from vlm.report.records import Picture, View

LEVELS = 8  # steps of heat; each is one path, so that a grid of 24 x 24 stays small


def gallery(pictures: Iterable[Picture]) -> Html:
    """All pictures, each with one card per view."""
    return join(_picture(picture, f"picture-{number}") for number, picture in enumerate(pictures))


def _picture(picture: Picture, name: str) -> Html:
    holds = ", ".join(picture.objects) or "nothing that is named"
    image = tag(
        "image", id=name, href=f"data:image/png;base64,{picture.png}", width=picture.width, height=picture.height
    )
    original = _drawing(picture, image, f"Picture {picture.key}. It shows: {holds}.")
    objects = tag("ul", *(tag("li", one) for one in picture.objects), class_="objects")
    aside = tag("div", original, tag("h3", picture.key), tag("p", "In the picture:"), objects, class_="original")
    cards = [_view(picture, view, name) for view in picture.views]
    return tag("article", aside, tag("div", *cards, class_="views"), class_="picture")


def _drawing(picture: Picture, image: Html, words: str, *overlays: str) -> Html:
    box = f"0 0 {picture.width} {picture.height}"
    return tag("svg", tag("title", words), image, *overlays, viewBox=box, role="img", class_="pixels")


def _view(picture: Picture, view: View, name: str) -> Html:
    image = tag("use", href=f"#{name}")
    figures = []
    patches = view.grid[0] * view.grid[1]
    if view.kept is None:
        drawing = _drawing(picture, image, f"{view.label}: all {patches} patches of picture {picture.key}")
        figures.append(tag("figure", drawing, tag("figcaption", f"all {patches} patches")))
    else:
        count = len(set(view.kept))
        words = f"{view.label}: kept {count} of {patches} patches of picture {picture.key}; the others are dimmed"
        drawing = _drawing(picture, image, words, _kept(picture, view))
        figures.append(tag("figure", drawing, tag("figcaption", f"kept {count} of {patches}")))
    if view.heat is not None and sum(view.heat) > 0:
        peak = max(view.heat) / sum(view.heat)
        words = f"{view.label}: where the answer looked; {_hottest(view)}"
        drawing = _drawing(picture, image, words, _heat(picture, view))
        figures.append(tag("figure", drawing, tag("figcaption", f"looked at; brightest {peak:.0%}")))
    invented = sum(mention.hallucinated for mention in view.mentions)
    count = f"{invented} invented" if invented else "nothing invented" if view.mentions else ""
    tally = tag("small", count, class_="invented" if invented else None)
    answer = tag("p", marked(view), class_="answer")
    return tag(
        "section", tag("h4", view.label, " ", tally), tag("div", *figures, class_="looks"), answer, class_="view"
    )


def _hottest(view: View) -> str:
    heat = view.heat or []
    top = max(range(len(heat)), key=heat.__getitem__)
    row, column = divmod(top, view.grid[1])
    return f"most at row {row + 1}, column {column + 1}, with {heat[top] / sum(heat):.0%} of it"


def _overlay(picture: Picture, view: View, *paths: Html) -> Html:
    """Paths over the whole image, in units of one patch: x counts columns, y counts rows."""
    rows, columns = view.grid
    size = {"width": picture.width, "height": picture.height, "viewBox": f"0 0 {columns} {rows}"}
    return tag("svg", *paths, **size, preserveAspectRatio="none")


def _cells(view: View, patches: Iterable[int], names: str) -> Html:
    """The outlines of patches (raster ids) as one path."""
    corners = (divmod(patch, view.grid[1]) for patch in patches)
    return tag("path", d="".join(f"M{column} {row}h1v1h-1z" for row, column in corners), class_=names)


def _kept(picture: Picture, view: View) -> Html:
    kept = set(view.kept or [])
    dropped = [patch for patch in range(view.grid[0] * view.grid[1]) if patch not in kept]
    return _overlay(picture, view, _cells(view, dropped, "dropped"), _cells(view, sorted(kept), "kept"))


def _heat(picture: Picture, view: View) -> Html:
    """The patches in steps of heat, relative to the hottest one."""
    heat = view.heat or []
    level = [round(LEVELS * value / max(heat)) for value in heat]
    steps = [[patch for patch in range(len(heat)) if level[patch] == step] for step in range(LEVELS + 1)]
    return _overlay(
        picture, view, *(_cells(view, steps[step], f"h{step}") for step in range(LEVELS + 1) if steps[step])
    )


def marked(view: View) -> Html:
    """The answer with the objects it names marked: invented ones by colour, a wavy line, a sign and a title."""
    parts: list[str] = []
    end = 0
    for mention in sorted(view.mentions, key=lambda mention: mention.start):
        parts.append(view.answer[end : mention.start])
        parts.append(_mention(view.answer[mention.start : mention.end], mention.object, mention.hallucinated))
        end = mention.end
    return join([*parts, view.answer[end:]])


def _mention(words: str, name: str, hallucinated: bool) -> Html:
    if not hallucinated:
        return tag("span", words, class_="seen", title=f"{name}: in the picture")
    spoken = tag("span", " (not in the picture)", class_="spoken")
    return tag("mark", words, spoken, title=f"{name}: not in the picture")
