"""The page: its order, its headings and its style sheet, all in one string that needs no network and no script."""

from pathlib import Path

from vlm.report import curves, pictures, tables
from vlm.report.compare import benchmarks, title
from vlm.report.findings import Finding, find
from vlm.report.html import Html, join, tag
from vlm.report.read import Run
from vlm.report.records import FEWEST, Chair, YesNo

STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
BADGES = {
    "fact": "found",
    "helps": "▲ helps",
    "hurts": "▼ hurts",
    "mixed": "◆ mixed",
    "same": "● no change",
    "caution": "! caution",
}
HOW_JUDGED = (
    "Small numbers under a score are its confidence interval and its change against plain. A method is said to help or "
    "hurt (▲, ▼, in colour) only where the interval of the difference leaves out zero. Changes in grey are not "
    "measurable, or are of a number whose interval is not known. "
)
PAIRED = "The interval of a difference is paired: both results answered the same items and are compared item by item."
UNPAIRED = (
    "The interval of a difference comes from those of the two scores (Newcombe 1998, square-and-add); this is "
    "cautious, for both answered the same questions."
)


def page(run: Run) -> str:
    """The whole document."""
    sections = [
        ("findings", "Findings", _findings(run)),
        ("comparison", "Comparison", _comparison(run)),
        ("position", "Hallucination by position", _position(run)),
        ("pictures", "Pictures", _pictures(run)),
        ("training", "Training", curves.training(run.stages, run.during)),
        ("protocol", "How each number was made", tables.protocols(run.evaluation)),
        ("reproduce", "Reproduce", _reproduce(run)),
    ]
    shown = [(name, heading, body) for name, heading, body in sections if body]
    links = [tag("a", heading, href=f"#{name}") for name, heading, _ in shown]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", f"{run.name}: run report"),
        tag("style", Html(STYLE.read_text(encoding="utf-8"))),
    )
    main = [tag("section", tag("h2", heading), body, id=name) for name, heading, body in shown]
    body = tag("body", _header(run), tag("nav", *links, aria_label="Parts of this page"), tag("main", *main))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _header(run: Run) -> Html:
    evaluation = run.evaluation
    created = evaluation.created.replace("T", " ").replace("+00:00", " UTC")
    facts = [fact for fact in (created, _trained(run), _evaluated(run)) if fact]
    recipe = evaluation.recipe_hash and tag("span", "recipe ", tag("code", evaluation.recipe_hash[:16]))
    line = tag("p", *(tag("span", fact) for fact in facts), recipe or "", class_="facts")
    missing = tag("ul", *(tag("li", note) for note in run.notes), class_="notes", aria_label="What is missing")
    return tag(
        "header", tag("p", "run report", class_="kicker"), tag("h1", run.name), line, missing if run.notes else ""
    )


def _trained(run: Run) -> str:
    steps = sum(stage.done for stage in run.stages)
    plural = "stage" if len(run.stages) == 1 else "stages"
    return f"{len(run.stages)} {plural}, {steps} steps" if run.stages else ""


def _evaluated(run: Run) -> str:
    results = len(run.evaluation.results)
    return f"{results} result{'s' if results > 1 else ''} compared" if results else ""


def _findings(run: Run) -> Html:
    found = find(run.evaluation)
    if not found:
        return Html("")
    methods = [finding for finding in found if finding.subject]
    others = [finding for finding in found if not finding.subject]
    parts = [_tiles(run), _list(others)]
    if methods:
        parts += [tag("h3", "Each method against plain"), _list(methods)]
    return join(parts)


def _list(found: list[Finding]) -> Html:
    return tag("ul", *(_finding(finding) for finding in found), class_="findings")


def _finding(finding: Finding) -> Html:
    badge = tag("span", BADGES[finding.kind], class_=f"badge {finding.kind}")
    start = f"{finding.subject}: " if finding.subject else ""
    return tag("li", badge, tag("span", tag("b", start) if start else "", finding.text.removeprefix(start)))


def _tiles(run: Run) -> Html:
    """The headline numbers of the plain model."""
    plain = run.evaluation.plain
    if plain is None:
        return Html("")
    names = list(benchmarks(run.evaluation.results))
    tiles = []
    for name, scores in plain.metrics.items():
        if isinstance(scores, YesNo | Chair):
            value, what = (scores.accuracy, "accuracy") if isinstance(scores, YesNo) else (scores.chair_s, "CHAIRs")
            where = (
                title(name, names) if isinstance(scores, YesNo) else title(name, names).removeprefix("CHAIR").strip()
            )
            interval = tag("small", tables.interval_words(scores.ci)) if scores.ci else ""
            of = f"n = {scores.n}" if scores.n is not None else ""
            label = f"{where} {what}" if isinstance(scores, YesNo) else f"{what} {where}"
            tiles.append(
                tag("div", tag("span", label), tag("b", f"{value:.3f}"), interval, tag("small", of), class_="tile")
            )
    return tag("div", *tiles, class_="tiles") if tiles else Html("")


def _comparison(run: Run) -> Html:
    if not run.evaluation.results:
        return Html("")
    drawn = tables.differences(run.evaluation)
    how = PAIRED if any(method.change for method in run.evaluation.methods) else UNPAIRED
    heading = tag("h3", "Differences from plain, with their intervals") if drawn else ""
    return join([tables.comparison(run.evaluation), tag("p", HOW_JUDGED + how, class_="how"), heading, drawn])


def _position(run: Run) -> Html:
    drawn = curves.by_position(run.evaluation)
    words = "Of the objects named first, second, … in the captions, the share that is not in the picture. "
    words += f"Positions that fewer than {FEWEST} captions reach are left out."
    return join([tag("p", words, class_="how"), drawn]) if drawn else drawn


def _pictures(run: Run) -> Html:
    drawn = pictures.gallery(run.pictures)
    words = join(
        [
            "Patches that a pruner dropped are dimmed. Where the answer looked is heat over the picture, brightest "
            "where most. In the answers, objects that are there are ",
            tag("span", "underlined", class_="seen"),
            ", and invented ones are ",
            tag("mark", "marked"),
            ".",
        ]
    )
    return join([tag("p", words, class_="how"), drawn]) if drawn else drawn


def _reproduce(run: Run) -> Html:
    """Commands, versions and the resolved recipe."""
    evaluation = run.evaluation
    parts: list[str] = []
    if run.recipe:
        commands = "vlm plan recipe.yaml\nvlm run recipe.yaml\nvlm evaluate recipe.yaml\nvlm report recipe.yaml"
        words = "The recipe of this run, resolved, is recipe.yaml in its folder. Check it; run all of it; or one part:"
        parts += [tag("p", words), tag("pre", commands)]
        parts.append(tag("details", tag("summary", "Resolved recipe"), tag("pre", run.recipe)))
    facts = {"recipe hash": evaluation.recipe_hash, **evaluation.versions}
    known = {key: value for key, value in facts.items() if value}
    if known:
        parts.append(tag("details", tag("summary", "Versions and hash"), tables.key_values(known), open=True))
    return join(parts)
