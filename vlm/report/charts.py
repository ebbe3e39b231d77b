"""Line charts as inline SVG: no script, no network, and colours from the page's style sheet, so they follow dark mode.

Every chart says in words (``<desc>``) where each line starts, ends and has its extremes, for those who do not see it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlm.report.html import Html, join, tag

WIDTH, HEIGHT = 440, 250  # in CSS pixels at full size; the drawing scales with its column
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 38
COLOURS = 8  # --c0 .. --c7 of the style sheet; dashes tell further lines apart
DASHES = ("", "6 3", "2 3")
POINTS = 300  # a line of more points is thinned to its extremes: finer than this the eye does not see


@dataclass(frozen=True)
class Line:
    """A named line; a value that is not finite leaves a gap. ``strong`` draws it thicker than the others."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    strong: bool = False


@dataclass(frozen=True)
class Chart:
    """What to draw. ``smooth`` draws a running mean over each raw line, ``dots`` marks every point of short lines."""

    title: str
    x_label: str
    lines: Sequence[Line]
    smooth: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Frame:
    """The mapping of data to pixels, with its round ticks."""

    x: list[float]
    y: list[float]
    low: tuple[float, float]
    high: tuple[float, float]

    def across(self, x: float) -> float:
        return LEFT + (x - self.low[0]) / (self.high[0] - self.low[0]) * (WIDTH - LEFT - RIGHT)

    def up(self, y: float) -> float:
        return HEIGHT - BOTTOM - (y - self.low[1]) / (self.high[1] - self.low[1]) * (HEIGHT - TOP - BOTTOM)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], about so many."""
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs((high - low) / step - about))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the finite values at most ``width // 2`` places away (near the ends that is on one side more)."""
    reach, smoothed = width // 2, []
    for i in range(len(values)):
        finite = [value for value in values[max(0, i - reach) : i + reach + 1] if math.isfinite(value)]
        smoothed.append(sum(finite) / len(finite) if finite else math.nan)
    return smoothed


def thin(points: list[tuple[float, float]], limit: int = POINTS) -> list[tuple[float, float]]:
    """At most about ``limit`` points with the same extremes: the lowest and the highest of each bucket, in order."""
    if len(points) <= limit:
        return points
    size = math.ceil(2 * len(points) / limit)
    kept = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        ends = {min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def draw(chart: Chart) -> Html:
    """The chart as a figure with its title, its legend where it has several lines, and its words."""
    seen = [line for line in chart.lines if any(math.isfinite(y) for y in line.y)]
    if not seen:
        return Html("")
    frame = _frame(seen, zero_based=all(y >= 0 for line in seen for y in line.y if math.isfinite(y)))
    lines = [_line(chart, frame, line, number) for number, line in enumerate(seen)]
    drawing = tag(
        "svg",
        tag("title", chart.title),
        tag("desc", "; ".join(_words(line) for line in seen)),
        _axes(frame, chart.x_label),
        *lines,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
    )
    caption = tag("figcaption", chart.title)
    return tag("figure", caption, drawing, _legend(chart, seen), class_="chart")


def _frame(lines: Sequence[Line], zero_based: bool) -> Frame:
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    low = 0.0 if zero_based and low <= 0.6 * high else low
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    low, high = (low if low == 0 and zero_based else low - room), high + room
    right = right if right > left else left + 1
    return Frame(ticks(left, right, 5), ticks(low, high, 4), (left, low), (right, high))


def _axes(frame: Frame, x_label: str) -> Html:
    """Grid lines and numbers at the round ticks."""
    parts: list[str] = []
    floor = HEIGHT - BOTTOM
    for y in frame.y:
        at = f"{frame.up(y):.1f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", short(y), x=LEFT - 7, y=at, dy="0.32em", text_anchor="end"))
    for x in frame.x:
        at = f"{frame.across(x):.1f}"
        parts.append(tag("line", x1=at, x2=at, y1=floor, y2=floor + 4, class_="axis"))
        anchor = "end" if frame.across(x) > WIDTH - RIGHT - 8 else "middle"
        parts.append(tag("text", short(x), x=at, y=floor + 17, text_anchor=anchor))
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=floor, y2=floor, class_="axis"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", x_label, x=middle, y=HEIGHT - 4, text_anchor="middle", class_="label"))
    return join(parts)


def _line(chart: Chart, frame: Frame, line: Line, number: int) -> Html:
    colour, dash = f"c{number % COLOURS}", DASHES[number // COLOURS % len(DASHES)] or None
    width = max(3, len(line.y) // 30 | 1)
    if chart.smooth and len(line.y) >= 20:
        raw = _path(frame, line.x, line.y, f"raw {colour}")
        return join([raw, _path(frame, line.x, running_mean(line.y, width), f"line {colour}", dash)])
    drawn = _path(frame, line.x, line.y, f"line {colour}{' strong' if line.strong else ''}", dash)
    dots = _dots(frame, line, colour) if chart.dots or len(line.y) == 1 else ""
    return join([drawn, dots])


def _path(frame: Frame, xs: Sequence[float], ys: Sequence[float], names: str, dash: str | None = None) -> Html:
    """The line through the points, broken where a value is not finite."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    pieces = [" ".join(f"{frame.across(x):.1f},{frame.up(y):.1f}" for x, y in thin(run)) for run in runs if run]
    return tag("path", d="".join(f"M{piece}" for piece in pieces), class_=names, stroke_dasharray=dash)


def _dots(frame: Frame, line: Line, colour: str) -> Html:
    return join(
        tag("circle", tag("title", f"{line.label}: {y:.3g}"), cx=f"{frame.across(x):.1f}", cy=f"{frame.up(y):.1f}",
            r=4 if line.strong else 3, class_=f"dot {colour}")
        for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)
    )  # fmt: skip


def _legend(chart: Chart, lines: Sequence[Line]) -> Html:
    if len(lines) < 2:
        return Html("")
    entries = []
    for number, line in enumerate(lines):
        dash = DASHES[number // COLOURS % len(DASHES)] or None
        names = f"line c{number % COLOURS}{' strong' if line.strong else ''}"
        key = tag("path", d="M1,6 27,6", class_=names, stroke_dasharray=dash)
        swatch = tag("svg", key, viewBox="0 0 28 12", class_="key", aria_hidden="true")
        entries.append(tag("li", swatch, line.label))
    return tag("ul", *entries, class_="legend")


def _words(line: Line) -> str:
    finite = [y for y in line.y if math.isfinite(y)]
    return (
        f"{line.label}: starts at {short(finite[0])}, ends at {short(finite[-1])}, "
        f"lowest {short(min(finite))}, highest {short(max(finite))}"
    )


def short(value: float) -> str:
    """A number for an axis: at most four digits, thousands as k, millions as M."""
    for factor, unit in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            return f"{value / (1e3 if unit == 'k' else factor):.4g}{unit}"
    return (
        f"{value:.4g}".replace("e-0", "e-").replace("-", "−", 1) if value < 0 else f"{value:.4g}".replace("e-0", "e-")
    )
