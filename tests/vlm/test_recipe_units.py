"""Units against arithmetic: what is written and read is the number; what a YAML reader would guess is refused."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.recipe.tree import Text
from vlm.recipe.units import (
    natural,
    parse_bool,
    parse_float,
    parse_int,
    parse_ratio,
    parse_seconds,
    parse_steps_or_ratio,
    parse_str,
)


@given(st.integers(-(10**15), 10**15), st.sampled_from([("", 1), ("k", 10**3), ("M", 10**6), ("B", 10**9)]))
def test_a_count_with_its_unit(number: int, unit: tuple[str, int]):
    assert parse_int(f"{number}{unit[0]}") == number * unit[1]


@given(st.integers(0, 10**6), st.integers(0, 999))
def test_a_count_with_a_fraction_of_its_unit(thousands: int, rest: int):
    assert parse_int(f"{thousands}.{rest:03d}k") == 1000 * thousands + rest


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_as_python_writes_it(number: float):
    assert parse_float(repr(number)) == number
    assert parse_float(number) == number


@given(st.decimals(0, 100, places=4))
def test_a_share_is_the_exact_hundredth(percent):
    assert parse_ratio(f"{percent}%") == float(Fraction(percent) / 100)


@given(st.integers(0, 10**5), st.sampled_from([("h", 3600), ("m", 60), ("s", 1)]))
def test_a_duration_in_seconds(number: int, unit: tuple[str, int]):
    assert parse_seconds(f"{number}{unit[0]}") == number * unit[1]


@pytest.mark.parametrize(
    "text, value", [("100", 100), ("2k", 2000), ("3%", 0.03), ("0.5", 0.5), ("1", 1), ("1.0", 1.0)]
)
def test_steps_are_whole_and_shares_are_not(text: str, value: float):
    found = parse_steps_or_ratio(text)
    assert (found, type(found)) == (value, type(value))


# Each of these PyYAML 6 reads as a number, a truth value or a date, or takes 2e-6 for text.
@pytest.mark.parametrize(
    "parse, text",
    [
        (parse_int, "012"),
        (parse_int, "1:30"),
        (parse_int, "0x1f"),
        (parse_int, "1_000"),
        (parse_int, "1e3"),
        (parse_int, "2.0"),
        (parse_int, "1.0005k"),
        (parse_int, "8K"),
        (parse_int, "true"),
        (parse_int, True),
        (parse_int, 2.0),
        (parse_int, "١٢"),
        (parse_float, "1:30"),
        (parse_float, ".inf"),
        (parse_float, "nan"),
        (parse_float, "1e999"),
        (parse_float, True),
        (parse_float, "012.5"),
        (parse_ratio, "101%"),
        (parse_ratio, "20"),
        (parse_ratio, "-1%"),
        (parse_bool, "on"),
        (parse_bool, "yes"),
        (parse_bool, "True"),
        (parse_bool, 1),
        (parse_seconds, "1:30"),
        (parse_seconds, "90"),
        (parse_seconds, "-1s"),
        (parse_str, 3),
        (parse_steps_or_ratio, "-5"),
        (parse_steps_or_ratio, "1.5"),
    ],
)
def test_surprises_are_refused(parse, text):
    with pytest.raises(ValueError, match=r"^must be .*, found "):
        parse(text)


@pytest.mark.parametrize("text", ["on", "012", "1:30", "2e-6", "null", "2024-01-01"])
def test_text_stays_what_was_written(text: str):
    assert parse_str(text) == text


def test_untyped_values_are_those_of_json():
    tree = {"a": Text("2e-6"), "b": [Text("7"), Text("7", quoted=True), None], "c": Text("true"), "d": Text("on")}
    assert natural(tree) == {"a": 2e-6, "b": [7, "7", None], "c": True, "d": "on"}
    assert [natural(Text(text)) for text in ("012", "1:30", "yes", "1e999")] == ["012", "1:30", "yes", "1e999"]
