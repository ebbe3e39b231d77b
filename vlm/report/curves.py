"""Which curves the page shows: training per stage, and hallucination by position in the caption."""

from collections.abc import Sequence
from itertools import pairwise

from vlm.report.charts import Chart, Line, draw
from vlm.report.compare import title
from vlm.report.html import Html, join, tag
from vlm.report.read import Stage
from vlm.report.records import Chair, Evaluation, Result

TITLES = {
    "samples_per_s": "samples per second",
    "tokens_per_s": "tokens per second",
    "data_wait_s": "waiting for data (seconds per step)",
}
MEMBERS = 12  # methods in one chart: more lines cannot be told apart
RATES = (
    *("samples_per_s", "tokens_per_s", "llm_tokens_per_s", "padded_tokens_per_s", "data_wait_s", "tflops", "mfu"),
    *("grad_norm", "peak_memory_gib", "max_over_mean_flops", "max_over_mean_time"),
)


def training(stages: list[Stage], during: Sequence[Stage] = ()) -> Html:
    """For each stage: loss, its own scalars (such as tag accuracy), learning rates, how fast it went, and the main
    number of each benchmark that was asked ``during`` it."""
    if not stages:
        return Html("")
    words = "Thin lines are the values as they were logged, thick ones their mean over neighbouring steps."
    return join(
        [
            tag("p", words, class_="how"),
            *(_stage(stage, [d for d in during if d.number == stage.number]) for stage in stages),
        ]
    )


def _stage(stage: Stage, during: Sequence[Stage]) -> Html:
    curves = stage.curves
    rates = {name.removeprefix("lr."): values for name, values in curves.items() if name.startswith("lr.")}
    own = [name for name in curves if name not in ("loss", "seconds", "lr", *RATES) and not name.startswith("lr.")]
    charts = [_curve(stage, name) for name in ("loss", *own) if name in curves]
    if rates:
        lines = [Line(part, stage.steps, values) for part, values in rates.items()]
        only = f": {lines[0].label}" if len(lines) == 1 else ""
        charts.append(draw(Chart("learning rate" + only, "step", lines)))
    charts += [_curve(stage, name) for name in RATES if name in curves]
    charts += [chart for judged in during for chart in _judged(judged)]
    heading = tag("h3", f"Stage {stage.number + 1}: {stage.name}", tag("small", f" {_length(stage)}"))
    return tag("section", heading, tag("div", *charts, class_="charts"), class_="stage")


def _judged(stage: Stage) -> list[Html]:
    """A chart for the main number of each benchmark: CHAIRs, accuracy, or the first that it reports."""
    found: dict[str, list[str]] = {}
    for name in stage.curves:
        if name.startswith("metrics."):
            benchmark, quantity = name.removeprefix("metrics.").split(".", 1)
            found.setdefault(benchmark, []).append(quantity)
    charts = []
    for benchmark, quantities in found.items():
        main = next((name for name in ("chair_s", "accuracy") if name in quantities), quantities[0])
        heading = f"{title(benchmark, found)} {'' if main == 'chair_s' else main.replace('_', ' ')}".strip()
        line = Line(heading, stage.steps, stage.curves[f"metrics.{benchmark}.{main}"])
        charts.append(draw(Chart(f"{heading}, while training", "step", [line], dots=True)))
    return charts


def _curve(stage: Stage, name: str) -> Html:
    heading = TITLES.get(name, name.replace("_", " ").replace(".", " "))
    return draw(Chart(heading, "step", [Line(heading, stage.steps, stage.curves[name])], smooth=True))


def _length(stage: Stage) -> str:
    steps = f"{stage.done} steps" if stage.is_complete else f"{stage.done} of {stage.planned} steps"
    clock = stage.curves.get("seconds", [])  # starts anew in a resumed run: only its advances count
    seconds = sum(max(0.0, after - before) for before, after in pairwise(clock))
    return f"{steps}, {duration(seconds)}" if seconds else steps


def duration(seconds: float) -> str:
    """``2 h 05 min``, ``3 min 20 s`` or ``12.3 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def by_position(evaluation: Evaluation) -> Html:
    """How the share of invented objects grows with the position in the caption: plain first, then with methods."""
    plain = evaluation.plain
    names = list(
        dict.fromkeys(
            name
            for result in evaluation.results
            for name, scores in result.metrics.items()
            if isinstance(scores, Chair) and scores.positions
        )
    )
    charts = []
    if plain is not None and len(names) > 1:
        lines = [_position_line(plain, name, title(name, names), strong=True) for name in names]
        charts.append(_position_chart("Plain model", lines))
    families = {
        "pruned": [result for result in evaluation.methods if (result.prune or result.kv) and not result.mitigate],
        "mitigated": [result for result in evaluation.methods if result.mitigate or result.decode],
    }
    for name in names:
        for family, members in families.items():
            for first in range(0, len(members), MEMBERS):
                some = members[first : first + MEMBERS]
                shown = [plain, *some] if plain is not None else some
                lines = [_position_line(result, name, result.label, result is plain) for result in shown]
                which = f", {some[0].label} to {some[-1].label}" if len(members) > MEMBERS else ""
                charts.append(_position_chart(f"{title(name, names)}: {family}{which}", lines))
        if plain is not None and len(names) == 1 and not evaluation.methods:
            charts.append(_position_chart(title(name, names), [_position_line(plain, name, plain.label, True)]))
    return tag("div", *charts, class_="charts") if charts else Html("")


def _position_chart(heading: str, lines: list[Line]) -> Html:
    return draw(Chart(heading, "object named as number … in the caption", lines, dots=True))


def _position_line(result: Result, benchmark: str, label: str, strong: bool) -> Line:
    rates = getattr(result.metrics.get(benchmark), "positions", ())
    known = [float("nan") if rate is None else rate for rate in rates]
    return Line(label, range(1, len(known) + 1), known, strong)
