"""The comparison table, the differences drawn with their intervals, and the protocol cards."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from vlm.report.compare import Difference, Quantity, benchmarks, difference, judged, quantities, title
from vlm.report.findings import quantity_title
from vlm.report.html import Html, join, tag
from vlm.report.records import Cost, Evaluation, Interval, Result

SIGNS = {"helps": "▲", "hurts": "▼", "same": "●"}
WORDS = {"helps": "better than plain", "hurts": "worse than plain", "same": "no measurable change"}
WIDTH, HEIGHT = 150, 26  # of one drawn interval
# Headings of the columns of costs, each with what it means in small.
COSTS = (
    ("LLM FLOPs", Html("")),
    ("KV bytes", tag("small", "held")),
    ("prefill", tag("small", "time, with scoring")),
    ("token", tag("small", "time of each further one")),
    ("seconds", tag("small", "of the evaluation")),
)


def comparison(evaluation: Evaluation) -> Html:
    """Rows are results, columns what was measured; each score with its interval and its change against plain."""
    results, names = evaluation.results, list(benchmarks(evaluation.results))
    columns = {name: quantities(results, name) for name in names}
    groups = [
        tag("th", title(name, names), colspan=len(columns[name]), scope="colgroup", class_="group")
        for name in names
        if columns[name]
    ]
    shown = [quantity for name in names for quantity in columns[name]]
    firsts = {columns[name][0] for name in names if columns[name]}
    tokens = tag("th", "visual tokens", tag("small", "final, and mean over layers"), rowspan=2, scope="col")
    costs = [tag("th", *words, scope="col", class_=None if number else "group") for number, words in enumerate(COSTS)]
    head = tag(
        "thead",
        tag("tr", tag("th", "result", rowspan=2, scope="col"), tokens, *groups,
            tag("th", "cost (×: relative to plain)", colspan=len(costs), scope="colgroup", class_="group")),
        tag("tr", *(tag("th", q.title, scope="col", class_="group" if q in firsts else None) for q in shown), *costs),
    )  # fmt: skip
    rows = [_row(evaluation, result, shown, firsts) for result in results]
    table = tag("table", head, tag("tbody", *rows), class_="comparison")
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label="Comparison of all results")


def _row(evaluation: Evaluation, result: Result, shown: Sequence[Quantity], firsts: set[Quantity]) -> Html:
    plain = evaluation.plain
    cells = [_cell(q, plain, result, "group" if q in firsts else None) for q in shown]
    base = plain.cost if plain else Cost()
    return tag(
        "tr",
        tag("th", result.label, scope="row"),
        _tokens(result),
        *cells,
        tag("td", _ratio(result.cost.llm_flops_per_prompt, base.llm_flops_per_prompt), class_="group"),
        tag("td", _ratio(result.cost.kv_bytes_per_prompt, base.kv_bytes_per_prompt)),
        _against(result.cost.prefill_s, base.prefill_s),
        _against(result.cost.token_s, base.token_s),
        tag("td", "–" if result.cost.seconds is None else f"{result.cost.seconds:.1f}"),
        class_="plain" if result.is_plain else None,
    )


def _tokens(result: Result) -> Html:
    tokens = result.cost.visual_tokens
    if tokens is None:
        return tag("td", "–")
    parts = [tag("b", f"{tokens.after:g}"), f" of {tokens.before:g}"]
    if tokens.average is not None and tokens.average != tokens.after:
        parts.append(tag("small", f"mean {tokens.average:.3g}", title="mean over the layers of the decoder"))
    return tag("td", *parts)


def _against(seconds: float | None, base: float | None) -> Html:
    shown = "" if seconds is None else tag("small", f"{1e3 * seconds:.3g} ms", title="of one batch, median")
    return tag("td", _ratio(seconds, base), shown)


def _ratio(value: float | None, base: float | None) -> str:
    return "–" if value is None or not base else f"{value / base:.2f}×"


def _cell(quantity: Quantity, plain: Result | None, result: Result, names: str | None) -> Html:
    """The value; below it, small, its interval and the change, coloured only when it is outside its interval."""
    value = quantity.of(result)
    if value is None:
        return tag("td", "–", class_=names)
    parts: list[str] = [tag("span", number(quantity, value), class_="value")]
    interval = quantity.interval(result)
    if interval:
        parts.append(tag("small", interval_words(interval), title="confidence interval"))
    before = quantity.of(plain) if plain else None
    if plain is not None and not result.is_plain and before is not None:
        parts.append(_delta(quantity, value - before, difference(quantity, plain, result)))
    return tag("td", *parts, class_=names)


def _delta(quantity: Quantity, change: float, judged_change: Difference | None) -> Html:
    verdict = judged_change.verdict if judged_change else "same"
    sign = f" {SIGNS[verdict]}" if verdict != "same" else ""
    why = WORDS[verdict] if judged_change else "no interval is known for this number, so it is not judged"
    return tag("small", signed(quantity, change) + sign, class_=f"delta {verdict}", title=why)


def number(quantity: Quantity, value: float) -> str:
    return f"{value:.3f}" if quantity.is_rate else f"{value:.1f}"


def interval_words(interval: Interval) -> str:
    """``.892–.920``, without the zeros that every rate begins with."""
    return "–".join(f"{end:.3f}".removeprefix("0") for end in interval)


def signed(quantity: Quantity, change: float) -> str:
    """With a real minus sign; a change that rounds to nothing has no sign."""
    size = number(quantity, abs(change))
    return f"±{size}" if float(size) == 0 else f"{'−' if change < 0 else '+'}{size}"


def differences(evaluation: Evaluation) -> Html:
    """One drawn interval per method and judged number, on one scale per column: does it leave the zero line?"""
    plain, columns = evaluation.plain, judged(evaluation.results)
    if plain is None or not columns or not evaluation.methods:
        return Html("")
    found = [{q: difference(q, plain, method) for q in columns} for method in evaluation.methods]
    reach = {q: _reach([change for changes in found if (change := changes[q])]) for q in columns}
    head = tag("tr", tag("th", "result", scope="col"), *(_head(q, evaluation) for q in columns))
    rows = [
        tag("tr", tag("th", method.label, scope="row"),
            *(tag("td", _interval(changes[q], reach[q])) for q in columns))
        for method, changes in zip(evaluation.methods, found, strict=True)
    ]  # fmt: skip
    scale = tag("tr", tag("th", "scale", scope="row"), *(tag("td", _scale(reach[q])) for q in columns), class_="scale")
    table = tag("table", tag("thead", head), tag("tbody", *rows), tag("tfoot", scale), class_="differences")
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label="Differences from plain")


def _head(quantity: Quantity, evaluation: Evaluation) -> Html:
    better = "right is better" if quantity.better > 0 else "left is better"
    return tag("th", quantity_title(quantity, evaluation), tag("small", better), scope="col")


def _reach(changes: Sequence[Difference]) -> float:
    """Half the width of a column's scale: the farthest end of its intervals, rounded up to a round number."""
    farthest = max((max(abs(change.low), abs(change.high)) for change in changes), default=0.0)
    steps = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
    return next((step for step in steps if step >= farthest), farthest)


def _interval(change: Difference | None, reach: float) -> Html:
    if change is None:
        return Html("–")

    def across(value: float) -> str:
        return f"{(value / reach + 1) / 2 * (WIDTH - 12) + 6:.1f}"

    words = f"{change.value:+.3f}, interval {change.low:+.3f} to {change.high:+.3f}: {WORDS[change.verdict]}"
    marker = {"helps": "m-5,4 5,-9 5,9z", "hurts": "m-5,-4 5,9 5,-9z", "same": "m-4,0 a4,4 0 1 0 8,0 a4,4 0 1 0 -8,0z"}
    middle = HEIGHT / 2
    return tag(
        "svg",
        tag("title", words.replace("-", "−")),
        tag("line", x1=across(0), x2=across(0), y1=0, y2=HEIGHT, class_="zero"),
        tag("line", x1=across(change.low), x2=across(change.high), y1=middle, y2=middle, class_="bar"),
        tag("path", d=f"M{across(change.value)},{middle} {marker[change.verdict]}", class_="mark"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}", class_=f"interval {change.verdict}", role="img",
    )  # fmt: skip


def _scale(reach: float) -> Html:
    ends = ((6, "start", f"−{reach:g}"), (WIDTH / 2, "middle", "0"), (WIDTH - 6, "end", f"+{reach:g}"))
    marks = [tag("text", words, x=x, y=12, text_anchor=anchor) for x, anchor, words in ends]
    return tag("svg", *marks, viewBox=f"0 0 {WIDTH} 16", class_="interval", aria_hidden="true")


def protocols(evaluation: Evaluation) -> Html:
    """How each number was made: one card per benchmark, what differs between results said for each."""
    names = list(benchmarks(evaluation.results))
    return join(_card(evaluation, name, title(name, names)) for name in names)


def _card(evaluation: Evaluation, benchmark: str, heading: str) -> Html:
    cards = [(r.label, r.protocol.get(benchmark, {})) for r in evaluation.results if benchmark in r.metrics]
    without = [label for label, card in cards if not card]
    keys = list(dict.fromkeys(key for _, card in cards for key in card))
    rows = [tag("tr", tag("th", key.replace("_", " "), scope="row"), tag("td", _entry(cards, key))) for key in keys]
    if without:
        rows.append(tag("tr", tag("th", "no card"), tag("td", ", ".join(without)), class_="missing"))
    return tag("details", tag("summary", heading), tag("table", tag("tbody", *rows), class_="card"))


def _entry(cards: Sequence[tuple[str, dict[str, Any]]], key: str) -> Html:
    """One value when all results agree, else the value of each."""
    values = [(label, _plain_words(card[key])) for label, card in cards if key in card]
    if len({value for _, value in values}) == 1:
        return tag("span", values[0][1])
    return tag("ul", *(tag("li", f"{label}: {value}") for label, value in values))


def _plain_words(value: Any) -> str:
    """A value of a card without the brackets of JSON."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_plain_words(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)


def key_values(pairs: dict[str, Any], show: Callable[[Any], str] = _plain_words) -> Html:
    """A table of names and values."""
    rows = [tag("tr", tag("th", key, scope="row"), tag("td", show(value))) for key, value in pairs.items()]
    return tag("table", tag("tbody", *rows), class_="card")
