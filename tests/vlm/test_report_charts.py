"""Charts: round ticks, honest lines, and markup that cannot be broken."""

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.report.charts import HEIGHT, WIDTH, Chart, Line, draw, running_mean, short, thin, ticks
from vlm.report.curves import by_position
from vlm.report.html import Html, tag
from vlm.report.records import Evaluation


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low: float, span: float):
    found = ticks(low, low + span, 5)
    assert 2 <= len(found) <= 10
    room = 1e-6 * span + 1e-9 * abs(low)
    assert low - room <= found[0] and found[-1] <= low + span + room
    step = found[1] - found[0]
    digits = step / 10 ** math.floor(math.log10(step) + 1e-6)
    spacing = 4 * math.ulp(max(abs(low), 1e-12)) / step  # ticks far from 0 are rounded to a float themselves
    assert min(abs(digits - round_one) for round_one in (1, 2, 5, 10)) < 1e-3 + 10 * spacing


def test_ticks_of_known_ranges():
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(10, 2000, 5) == [500, 1000, 1500, 2000]
    assert ticks(0, 0.003, 4) == [0, 0.001, 0.002, 0.003]


def test_the_running_mean_keeps_constants_and_slopes_and_skips_gaps():
    assert running_mean([2.0] * 9, 5) == [2.0] * 9
    slope = [float(k) for k in range(9)]
    assert running_mean(slope, 5)[2:7] == slope[2:7]
    assert running_mean([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert math.isnan(running_mean([math.nan], 3)[0])


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=2000))
def test_thinning_keeps_the_extremes_and_the_order(values: list[float]):
    points = [(float(k), y) for k, y in enumerate(values)]
    kept = thin(points, 100)
    assert len(kept) <= max(100, 2) + 2
    assert kept == sorted(kept) and set(kept) <= set(points)
    assert {min(values), max(values)} <= {y for _, y in kept}


def points_of(markup: str) -> list[tuple[float, float]]:
    lines = "".join(re.findall(r'<path d="([^"]*)" class="line[^"]*"', markup))
    return [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+),([-\d.]+)", lines)]


@pytest.mark.parametrize("y", [[1.0], [0.0, 0.0], [5.0, 5.0, 5.0], [-3.0, 4.0], [1e-9, 2e9], [0.5] * 900])
def test_every_point_is_inside_the_drawing(y: list[float]):
    points = points_of(draw(Chart("loss", "step", [Line("loss", range(len(y)), y)], smooth=True)))
    assert points
    assert all(0 <= x <= WIDTH and 0 <= up <= HEIGHT for x, up in points)


def test_a_higher_value_is_drawn_higher_and_a_gap_stays_a_gap():
    markup = draw(Chart("loss", "step", [Line("loss", range(5), [1.0, 2.0, math.nan, 3.0, math.inf])]))
    heights = [y for _, y in points_of(markup)]
    assert heights == sorted(heights, reverse=True) and len(heights) == 3
    (path,) = re.findall(r'<path d="([^"]*)" class="line', markup)
    assert path.count("M") == 2


def test_smoothing_is_drawn_over_the_raw_line_and_never_instead_of_it():
    chart = Chart("loss", "step", [Line("loss", range(100), [float(k % 2) for k in range(100)])], smooth=True)
    markup = draw(chart)
    assert markup.index('class="raw c0"') < markup.index('class="line c0"')


def test_several_lines_have_a_legend_with_colours_and_then_dashes():
    lines = [Line(f"m{k}", [0, 1], [0, k + 1.0]) for k in range(10)]
    markup = draw(Chart("rate", "step", lines))
    assert markup.count("<li>") == 10
    keys = re.findall(r'<path d="M1,6 27,6"([^>]*)>', markup)
    assert len(set(keys)) == 10
    assert "<li>" not in draw(Chart("rate", "step", lines[:1]))


def test_a_chart_of_nothing_is_nothing():
    assert draw(Chart("loss", "step", [Line("loss", [1, 2], [math.nan, math.nan])])) == ""


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0, "0"), (2000.0, "2000"), (15000.0, "15k"), (3e6, "3M"), (2e-6, "2e-6"), (-0.5, "−0.5"), (0.001, "0.001")],
)
def test_short_numbers(value: float, words: str):
    assert short(value) == words


@given(st.text())
def test_text_and_attributes_are_escaped(words: str):
    markup = tag("b", words, title=words)
    inside = markup.removeprefix('<b title="').removesuffix("</b>")
    assert not re.search(r"[<\"']", inside.replace('">', "", 1))


def test_markup_joined_to_text_is_text_again():
    assert tag("p", tag("b", "x") + "<i>") == Html("<p>&lt;b&gt;x&lt;/b&gt;&lt;i&gt;</p>")
    assert tag("p", tag("b", "x"), hidden=True, lang=None) == "<p hidden><b>x</b></p>"


def test_many_methods_are_drawn_in_several_charts():
    scores = {"chair_s": 0.2, "by_position": [0.1, 0.3], "by_position_n": [90, 80]}
    pruned = [{"label": f"m{k}", "prune": {"use": "stride"}, "metrics": {"chair": scores}} for k in range(30)]
    results = [{"label": "plain", "metrics": {"chair": scores}}, *pruned]
    markup = by_position(Evaluation.model_validate_json(json.dumps({"results": results})))
    charts = markup.split("<figure")[1:]
    assert [chart.count("<li>") for chart in charts] == [13, 13, 7]  # twelve beside plain
    assert ["CHAIR: pruned, m0 to m11" in charts[0], "m24 to m29" in charts[2]] == [True, True]
