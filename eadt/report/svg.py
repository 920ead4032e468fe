"""Plots as inline SVG: panels over one shared time axis, and a stacked bar. Text in, text out.

Knows nothing of EADT: lines, steps, marks and bands. Colours are CSS classes (``c-<name>``), so the
page decides on light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 960
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 58, 42
_GAP = 30
_TAG_WIDTH = 26
_TAG_ROW = 19


@dataclass(frozen=True)
class Line:
    """One line of a panel: a CSS class and points; ``None`` breaks the line.

    A line without a name is not in the legend. ``steps`` holds each value until the next point; ``dots``
    draws the points alone.
    """

    name: str
    css: str
    at_s: Sequence[float]
    values: Sequence[float | None]
    steps: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot: a title with its unit, lines, and what to say when there is no value at all.

    ``whole`` labels whole numbers only; ``shaded`` are (start, end, title) on the time axis.
    """

    title: str
    lines: Sequence[Line]
    empty: str
    height: int = 120
    from_zero: bool = True
    whole: bool = False
    at_most: float | None = None
    shaded: Sequence[tuple[float, float, str]] = ()


@dataclass(frozen=True)
class Mark:
    """A moment on the time axis: a vertical line through all panels with a tag above."""

    at_s: float
    tag: str
    css: str
    title: str
    lane: int = 0


@dataclass(frozen=True)
class Band:
    """A stretch of the strip under the panels."""

    from_s: float
    to_s: float
    css: str
    title: str


def ticks(low: float, high: float, num: int, *, whole: bool = False) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``num`` of them; ``whole`` for counts."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / max(num, 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    if whole:
        every = max(round(raw), 1)
        return [float(tick) for tick in range(math.ceil(low), math.floor(high) + 1, every)]
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{place * step:.12g}") for place in range(first, math.floor(high / step + 1e-9) + 1)]


def time_unit(end_s: float) -> tuple[str, float]:
    """Unit of a time axis of this length, and its seconds."""
    if end_s < 300:
        return "s", 1.0
    return ("min", 60.0) if end_s < 3 * 3600 else ("h", 3600.0)


def _f(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _tick_text(value: float) -> str:
    return f"{value:,.10g}".replace(",", "\u202f")


class _Axis:
    def __init__(self, end_s: float) -> None:
        self.end_s = max(end_s, 1e-6)

    def x(self, at_s: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(max(at_s / self.end_s, 0.0), 1.0)


def _path(line: Line, axis: _Axis, y_of: Sequence[float | None]) -> str:
    parts: list[str] = []
    previous: float | None = None
    for at_s, y in zip(line.at_s, y_of, strict=True):
        x = axis.x(at_s)
        if y is not None and previous is None:
            parts.append(f"M{_f(x)} {_f(y)}")
            if not line.steps:
                parts.append("h0.01")  # a lone point between two gaps stays visible
        elif y is not None:
            parts.append(f"H{_f(x)}V{_f(y)}" if line.steps else f"L{_f(x)} {_f(y)}")
        elif line.steps and previous is not None:
            parts.append(f"H{_f(x)}")
        previous = y
    if line.steps and previous is not None:
        parts.append(f"H{_f(axis.x(axis.end_s))}")
    return "".join(parts)


def _panel(panel: Panel, axis: _Axis, top: float) -> list[str]:
    bottom = top + panel.height
    out = [f'<text class="title" x="{LEFT}" y="{_f(top - 8)}">{escape(panel.title)}</text>']
    # The legend is on the right of the title's line, only where there is something to tell apart.
    x = float(WIDTH - RIGHT)
    named = [line for line in panel.lines if line.name]
    if len(named) > 1:
        for line in reversed(named):
            x -= 7.2 * len(line.name)
            out.append(f'<text class="legend" x="{_f(x)}" y="{_f(top - 8)}">{escape(line.name)}</text>')
            x -= 22
            mark = (
                f'<circle class="dot {line.css}" cx="{_f(x + 8)}" cy="{_f(top - 12)}" r="3"/>'
                if line.dots
                else f'<path class="line {line.css}" d="M{_f(x)} {_f(top - 12)}h15"/>'
            )
            out.append(mark)
            x -= 12
    values = [value for line in panel.lines for value in line.values if value is not None]
    out += [
        f'<rect class="gap" x="{_f(axis.x(start))}" y="{_f(top)}" '
        f'width="{_f(max(axis.x(end) - axis.x(start), 1.0))}" height="{panel.height}">'
        f"<title>{escape(title)}</title></rect>"
        for start, end, title in panel.shaded
    ]
    if not values:
        out.append(f'<path class="grid base" d="M{LEFT} {_f(bottom)}H{WIDTH - RIGHT}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        out.append(
            f'<text class="empty" x="{_f(middle)}" y="{_f(top + panel.height / 2 + 4)}">'
            f"{escape(panel.empty)}</text>"
        )
        return out
    low = 0.0 if panel.from_zero else min(values)
    high = panel.at_most if panel.at_most is not None else max(values)
    margin = 0.0 if panel.at_most is not None else 0.08 * (high - low)
    high += margin or (0.0 if panel.at_most is not None else 0.1 * abs(high) or 1.0)
    if not panel.from_zero:
        low -= margin

    def y(value: float | None) -> float | None:
        return None if value is None else bottom - panel.height * (value - low) / (high - low)

    for tick in ticks(low, high, max(panel.height // 34, 2), whole=panel.whole):
        at = y(tick)
        assert at is not None
        out.append(
            f'<path class="grid{" base" if tick == low else ""}" d="M{LEFT} {_f(at)}H{WIDTH - RIGHT}"/>'
        )
        out.append(f'<text class="tick y" x="{LEFT - 8}" y="{_f(at + 3.5)}">{_tick_text(tick)}</text>')
    for line in panel.lines:
        y_of = [y(value) for value in line.values]
        if line.dots:
            out += [
                f'<circle class="dot {line.css}" cx="{_f(axis.x(at_s))}" cy="{_f(at)}" r="3.5">'
                f"<title>{escape(line.name)} {value:.4g}</title></circle>"
                for at_s, at, value in zip(line.at_s, y_of, line.values, strict=True)
                if at is not None and value is not None
            ]
        else:
            out.append(f'<path class="line {line.css}" d="{_path(line, axis, y_of)}"/>')
    return out


def _marks(marks: Sequence[Mark], axis: _Axis, bottom: float) -> list[str]:
    out: list[str] = []
    free_from: dict[int, float] = {}
    for mark in sorted(marks, key=lambda mark: mark.at_s):
        x = axis.x(mark.at_s)
        out.append(f'<g class="mark {mark.css}"><title>{escape(mark.title)}</title>')
        top = 2 + _TAG_ROW * mark.lane  # two kinds at one moment stand one under the other
        out.append(f'<path d="M{_f(x)} {top + 16}V{_f(bottom)}"/>')
        left = min(x - _TAG_WIDTH / 2, WIDTH - _TAG_WIDTH)
        if left >= free_from.get(mark.lane, -1.0):
            out.append(f'<rect x="{_f(left)}" y="{top}" width="{_TAG_WIDTH}" height="16" rx="3"/>')
            out.append(f'<text x="{_f(left + _TAG_WIDTH / 2)}" y="{top + 12}">{escape(mark.tag)}</text>')
            free_from[mark.lane] = left + _TAG_WIDTH + 1
        out.append("</g>")
    return out


def timeline_plot(
    panels: Sequence[Panel],
    end_s: float,
    marks: Sequence[Mark] = (),
    bands: Sequence[Band] = (),
    label: str = "",
) -> str:
    """Panels under each other on one time axis from 0 to ``end_s``, with marks through all of them.

    Args:
        panels: From top to bottom.
        end_s: End of the time axis in s.
        marks: Moments; tags of ``lane`` 0 are in the first row above, those of 1 in the second.
        bands: A strip under the panels.
        label: What the picture shows, for screen readers.
    """
    axis = _Axis(end_s)
    body: list[str] = []
    top = float(TOP + 8)
    bottom = top
    for panel in panels:
        body += _panel(panel, axis, top)
        bottom = top + panel.height
        top = bottom + _GAP
    if bands:
        body.append(f'<text class="tick y" x="{LEFT - 8}" y="{_f(bottom + 19)}">use</text>')
        for band in bands:
            left, right = axis.x(band.from_s), axis.x(band.to_s)
            body.append(
                f'<rect class="fill {band.css}" x="{_f(left)}" y="{_f(bottom + 9)}" '
                f'width="{_f(max(right - left, 0.6))}" height="13"><title>{escape(band.title)}</title></rect>'
            )
        bottom += 24
    unit, seconds = time_unit(end_s)
    for tick in ticks(0.0, end_s / seconds, 9):
        x = axis.x(tick * seconds)
        body.append(f'<path class="grid" d="M{_f(x)} {_f(bottom)}v5"/>')
        body.append(f'<text class="tick x" x="{_f(x)}" y="{_f(bottom + 18)}">{_tick_text(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    body.append(
        f'<text class="tick x" x="{_f(middle)}" y="{_f(bottom + 34)}">time since the start, {unit}</text>'
    )
    height = _f(bottom + BOTTOM)
    head = (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    )
    return "\n".join([head, *_marks(marks, axis, bottom), *body, "</svg>"])


def stacked_bar(parts: Sequence[tuple[str, str, float, str]], label: str) -> str:
    """One horizontal bar of (name, css class, value, text) parts; parts of 0 are left out."""
    total = math.fsum(value for _, _, value, _ in parts)
    height = 34
    out = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    ]
    x = 0.0
    for name, css, value, text in parts:
        if value <= 0 or total <= 0:
            continue
        width = WIDTH * value / total
        out.append(
            f'<g><title>{escape(name)}: {escape(text)}</title><rect class="fill {css}" x="{_f(x)}" y="0" '
            f'width="{_f(max(width - 2, 0.8))}" height="{height}" rx="2"/>'
        )
        if width > 9 * len(name) + 14:
            out.append(f'<text class="inbar" x="{_f(x + 9)}" y="22">{escape(name)}</text>')
        out.append("</g>")
        x += width
    return "\n".join([*out, "</svg>"])
