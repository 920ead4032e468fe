"""Figures as text: units, digits, uncertainty and bounds."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eadt.units import (
    Quantity,
    format_duration,
    format_energy,
    format_number,
    format_qualities,
    format_quantity,
)


@pytest.mark.parametrize(
    ("quantity", "unit", "text"),
    [
        (Quantity(112_880.0, 5_640.0), "J", "112.9 ± 5.6 kJ"),
        (Quantity(112_880.0, 5_640.0, at_least=True), "J", "at least 112.9 ± 5.6 kJ"),
        (Quantity(112_880.0, None, at_least=True), "J", "at least 112.88 kJ"),
        (Quantity(1.713, 0.34), "J/sample", "1.71 ± 0.34 J/sample"),
        (Quantity(0.0134, 0.0007), "J/token", "0.01340 ± 0.00070 J/token"),
        (Quantity(231.4, 2.3), "W", "231.4 ± 2.3 W"),
        (Quantity(76_800.0, 800.0), "W", "76.80 ± 0.80 kW"),
        (Quantity(812.0, 162.0), "J", "812 ± 162 J"),
        (Quantity(30.0, 45.0), "J", "30 ± 45 J"),
        (Quantity(2.0, 1e-5), "J", "2.000 ± 0.001 J"),  # never ± 0 where there is an uncertainty
        (Quantity(0.0, 3.0), "J", "0.0 ± 3.0 J"),
        (Quantity(0.0, 0.0), "J", "0 J"),
        (Quantity(1.2e-5, 3e-6), "J", "1.2e-05 ± 3e-06 J"),
        (None, "J", "not measured"),
    ],
)
def test_a_figure_says_how_sure_it_is(quantity: Quantity | None, unit: str, text: str) -> None:
    assert format_quantity(quantity, unit) == text


def test_in_brief_a_bound_is_still_a_bound() -> None:
    assert format_quantity(Quantity(3410.0, 100.0, at_least=True), "J", brief=True) == "≥ 3.41 kJ"
    assert format_quantity(Quantity(3410.0, 100.0), "J", brief=True) == "3.41 kJ"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "J", "0 J"), (1.7134, "J", "1.71 J"), (812.4, "J", "812 J"), (999.9, "J", "1\u202f000 J"),
        (7.2e10, "J", "20.00 MWh"), (3410.0, "J", "3.41 kJ"), (4.32e6, "J", "1.20 kWh"),
        (231.4, "W", "231 W"),
        (12_345.6, "", "12\u202f346"), (12_345.6, "s", "12\u202f346 s"), (1.234e-5, "J", "1.23e-05 J"),
    ],
)  # fmt: skip
def test_numbers_keep_three_to_four_digits(value: float, unit: str, text: str) -> None:
    assert format_number(value, unit) == text


def test_unknown_energy_is_said() -> None:
    assert format_energy(None) == "not measured"
    assert format_qualities([]) == "not measured"
    assert format_qualities(("estimated", "measured")) == "estimated + measured"


def test_durations_from_a_moment_to_a_month() -> None:
    texts = [format_duration(seconds) for seconds in (0.4234, 38.2, 245, 11_520, 30 * 86_400 + 7200, None)]
    assert texts == ["0.42 s", "38 s", "4 min 05 s", "3 h 12 min", "30 d 2 h", "unknown"]


@given(st.floats(1e-3, 1e12), st.floats(1e-12, 1e12))
def test_an_uncertainty_is_never_shown_as_nothing_or_much_smaller_than_it_is(
    value: float, share: float
) -> None:
    uncertainty = value * share
    text = format_quantity(Quantity(value, uncertainty), "J")
    match = re.fullmatch(r"([^±]+) ± ([^±]+) (J|kJ|kWh|MWh)", text)
    assert match is not None, text
    size = {"J": 1.0, "kJ": 1e3, "kWh": 3.6e6, "MWh": 3.6e9}[match[3]]
    shown = float(match[2].replace("\u202f", "")) * size
    assert shown > 0
    assert shown >= 0.9 * uncertainty
    assert float(match[1].replace("\u202f", "")) * size == pytest.approx(value, abs=max(shown, 1e-3 * value))
