"""A report as JSON, Markdown or one self-contained HTML page, and the files of it.

Owns the wording and the look. Every number gets its unit, every energy its quality, and what is not
known is shown as *not measured*, never as zero.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from eadt.report import svg
from eadt.report.document import Decision, Report, Resize, build_report
from eadt.report.timeline import USES
from eadt.units import format_bytes, format_duration, format_energy

FORMATS = {"json": "report.json", "markdown": "report.md", "html": "report.html"}
"""Formats and the names of their files."""

NOT_MEASURED = "not measured"

_SETPOINT_NAMES = {
    "num_workers": ("workers", ""),
    "workers_per_gpu": ("workers a device", ""),
    "mps_active_thread_percentage": ("share", " %"),
    "power_limit_w": ("power limit", " W"),
    "num_frozen_layers": ("frozen layers", ""),
}
_UNITS = {
    "samples_per_second": " samples/s",
    "tokens_per_second": " tokens/s",
    "samples_per_j": " samples/J",
    "_percentage": " %",
    "_w": " W",
    "_j": " J",
    "_s": " s",
}
_USE_MEANINGS = {
    "useful": "steps that count",
    "restart": "starting and changing the engines",
    "checkpoint": "saving",
    "idle": "no engine at work",
    "lost": "work that a fault undid",
}


def number(value: float | None, unit: str = "") -> str:
    """A number with 3 significant digits and its unit; *not measured* where it is unknown."""
    if value is None:
        return NOT_MEASURED
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}".replace(",", "\u202f")
    else:
        digits = f"{value:.2e}"
    return f"{digits} {unit}".strip()


def count(value: int | None) -> str:
    """A whole number with its thousands apart."""
    return NOT_MEASURED if value is None else f"{value:,}".replace(",", "\u202f")


def quality(qualities: Sequence[str]) -> str:
    """The qualities of a number as one word or phrase, such as ``estimated`` or ``measured + estimated``."""
    return " + ".join(qualities) if qualities else NOT_MEASURED


def moment(unix_s: float | None) -> str:
    """A wall time in UTC."""
    return "" if unix_s is None else f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M:%S} UTC"


def change(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """What differs between two setpoints, such as ``workers 4 → 2, share 50 % → 40 %``."""
    if not after:
        return "no change"
    parts: list[str] = []
    for name, value in after.items():
        old = before.get(name) if before else None
        if old != value:
            label, unit = _SETPOINT_NAMES.get(name, (name.replace("_", " "), ""))
            parts.append(f"{label} {_value(old, unit)} → {_value(value, unit)}")
    return ", ".join(parts) or "no change"


def _value(value: Any, unit: str = "") -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unset"}[value]
    return (f"{value:.4g}" if isinstance(value, float) else str(value)) + unit


def quantity(name: str, value: Any) -> str:
    """A field of ours with the unit that its name tells: ``power_w`` 420 is ``power 420 W``."""
    suffix = next((end for end in _UNITS if name.endswith(end)), "")
    label = name.removesuffix(suffix).strip("_").replace("_", " ")
    return f"{label} {_value(value)}{_UNITS.get(suffix, '')}".strip()


def sentence(values: Mapping[str, Any] | None, key: str) -> str:
    """What was expected or found in one sentence, where there is one; else all of it."""
    return str((values or {}).get(key) or "") or pairs(values)


def pairs(values: Mapping[str, Any] | None) -> str:
    """A small mapping as text: ``power 420 W, 10.2 samples/s``."""
    parts: list[str] = []
    for name, value in (values or {}).items():
        if isinstance(value, Mapping):
            parts.append(f"{name.replace('_', ' ')}: {pairs(value)}" if value else "")
        elif value is not None:
            parts.append(quantity(name, value))
    return ", ".join(part for part in parts if part)


def cell(value: object) -> str:
    """Text for a cell of a Markdown table: one line, nothing that ends the cell or begins a tag."""
    text = re.sub(r"\s+", " ", str(value)).strip()
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _is_change(decision: Decision) -> bool:
    return decision.setpoint_after is not None and decision.setpoint_before != decision.setpoint_after


def _end_s(report: Report) -> float:
    ends = [band.to_s for band in report.series.uses] + report.series.power_w.at_s
    return max([*ends, report.run.wall_s, 1.0])


def _resize_text(resize: Resize) -> str:
    if resize.from_workers != resize.to_workers:
        return f"workers {_value(resize.from_workers)} → {_value(resize.to_workers)}"
    return change(resize.setpoint_before, resize.setpoint_after)


def _marks(
    decisions: Sequence[tuple[str, Decision]], resizes: Sequence[tuple[str, Resize]]
) -> list[svg.Mark]:
    marks = [
        svg.Mark(
            decision.at_s,
            tag,
            "decision",
            f"{tag} {decision.action} at {format_duration(decision.at_s)}: "
            f"{change(decision.setpoint_before, decision.setpoint_after)} ({decision.outcome})",
            lane=0,
        )
        for tag, decision in decisions
        if _is_change(decision)
    ]
    return marks + [
        svg.Mark(
            resize.at_s,
            tag,
            "resize",
            f"{tag} {resize.kind} at {format_duration(resize.at_s)}: {_resize_text(resize)}",
            lane=1,
        )
        for tag, resize in resizes
    ]


def _component_css(component: str, place: int) -> str:
    return "c-total" if component == "total" else f"c-{place % 6 + 1}"


def _panels(report: Report) -> list[svg.Panel]:
    series = report.series
    label = quality(report.energy_j.qualities)
    power = series.power_w
    components = [name for name in power.values if name != "total"]
    shown = components if len(components) == 1 else [*components, "total"]
    gaps = [
        (
            gap.at_s,
            gap.at_s + gap.seconds,
            f"{gap.component} on {gap.node}: {gap.reason}, {gap.seconds:.3g} s",
        )
        for gap in report.energy_j.not_measured.longest_gaps
        if gap.seconds >= 0.5
    ]
    setpoint = series.setpoint
    share = [None if value is None else float(value) for value in setpoint.thread_percentage]
    workers = [None if value is None else float(value) for value in setpoint.num_workers]
    losses = [svg.Line("training", "c-1", series.loss.at_s, series.loss.loss)]
    if series.validation_loss.at_s:
        validation = series.validation_loss
        losses.append(svg.Line("validation", "c-2", validation.at_s, validation.loss, dots=True))
    throughput, efficiency = series.throughput_samples_per_s, series.efficiency_samples_per_j
    has_steps = bool(series.loss.step)
    rate = throughput.values["total"] if has_steps else []
    per_joule = efficiency.values["total"] if has_steps else []
    return [
        svg.Panel(
            f"Power, W ({label})",
            [
                svg.Line(name, _component_css(name, place), power.at_s, power.values[name])
                for place, name in enumerate(shown)
            ],
            NOT_MEASURED,
            height=150,
            shaded=gaps,
        ),
        svg.Panel(
            "Throughput, samples/s",
            [svg.Line("throughput", "c-1", throughput.at_s[: len(rate)], rate)],
            "no step has ended",
        ),
        svg.Panel(
            f"Efficiency, samples/J ({label})",
            [svg.Line("efficiency", "c-3", efficiency.at_s[: len(per_joule)], per_joule)],
            NOT_MEASURED if has_steps else "no step has ended",
        ),
        svg.Panel(
            "Active workers",
            [svg.Line("workers", "c-4", setpoint.at_s, workers, steps=True)],
            "not known",
            height=70,
            whole=True,
        ),
        svg.Panel(
            "Share of each engine, % of its device",
            [svg.Line("share", "c-2", setpoint.at_s, share, steps=True)],
            "not known",
            height=70,
            at_most=100.0,
        ),
        svg.Panel("Loss", losses, "no step has ended", height=110, from_zero=False),
    ]


def _use_rows(report: Report) -> list[dict[str, Any]]:
    energy = report.energy_j
    rows = []
    for use in USES:
        energy_j = energy.by_use[use]
        fraction = energy_j / energy.total if energy_j is not None and energy.total else None
        rows.append(
            {
                "use": use,
                "meaning": _USE_MEANINGS[use],
                "energy_j": energy_j,
                "percentage": None if fraction is None else 100 * fraction,
                "quality": quality(energy.qualities_by_use[use]) if energy_j else "",
                "seconds": report.seconds_by_use[use],
            }
        )
    return rows


def _total_text(report: Report) -> str:
    total = format_energy(report.energy_j.total)
    is_bound = report.energy_j.total is not None and report.energy_j.not_measured.num_gaps
    return f"at least {total}" if is_bound else total


def _tiles(report: Report) -> list[dict[str, str]]:
    label = quality(report.energy_j.qualities) if report.energy_j.total is not None else ""
    loss = report.loss
    has_validation = loss.validation_first is not None and loss.validation_last is not None
    first, last = (loss.validation_first, loss.validation_last) if has_validation else (loss.first, loss.last)
    kind = "validation loss" if has_validation else "training loss"
    num_resized = sum(resize.from_workers != resize.to_workers for resize in report.resizes)
    steps = f"{count(report.lost_steps)} lost" if report.lost_steps else "none lost"
    return [
        {"value": _total_text(report), "name": "energy", "note": label},
        {
            "value": number(report.joules_per_sample, "J"),
            "name": "energy per sample",
            "note": label,
        },
        {
            "value": number(report.mean_power_w, "W"),
            "name": "mean power",
            "note": label,
        },
        {
            "value": number(report.samples_per_second, "samples/s"),
            "name": "throughput",
            "note": "whole job, over all time",
        }
        if report.samples_per_second is not None
        else {"value": "no samples yet", "name": "throughput", "note": "whole job"},
        {"value": count(report.optimizer_steps), "name": "optimizer steps", "note": steps},
        {
            "value": f"{number(first)} → {number(last)}" if first is not None else NOT_MEASURED,
            "name": kind,
            "note": "first → last",
        },
        {
            "value": count(len(report.resizes)),
            "name": "changes of the setpoint",
            "note": f"{num_resized} of the worker count" if report.resizes else "none carried out",
        },
        {
            "value": format_duration(report.run.wall_s),
            "name": "time",
            "note": f"{report.run.num_sessions} sessions" if report.run.num_sessions > 1 else "wall clock",
        },
    ]


def _context(report: Report) -> dict[str, Any]:
    decisions = [(f"D{place}", decision) for place, decision in enumerate(report.decisions, start=1)]
    resizes = [(f"R{place}", resize) for place, resize in enumerate(report.resizes, start=1)]
    return {
        "report": report,
        "run": report.run,
        "energy": report.energy_j,
        "tiles": _tiles(report),
        "total_text": _total_text(report),
        "use_rows": _use_rows(report),
        "decisions": decisions,
        "changes": [(tag, decision) for tag, decision in decisions if _is_change(decision)],
        "holds": [(tag, decision) for tag, decision in decisions if not _is_change(decision)],
        "resizes": resizes,
        "resize_text": _resize_text,
        "damage": report.ledger.num_torn + len(report.ledger.corrupt) + len(report.ledger.unusable),
        "config_text": yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True),
    }


def _environment(*, is_html: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=is_html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "energy": format_energy,
        "duration": format_duration,
        "bytes": lambda value: "" if value is None else format_bytes(value),
        "number": number,
        "count": count,
        "quality": quality,
        "moment": moment,
        "pairs": pairs,
        "sentence": sentence,
        "cell": cell,
    }
    environment.globals["change"] = change
    return environment


def render_json(report: Report) -> str:
    """The report as JSON, in the shape of ``docs/report.schema.json``."""
    return report.model_dump_json(indent=2) + "\n"


def render_markdown(report: Report) -> str:
    """The report as Markdown, for terminals, merge requests and issues."""
    return _environment(is_html=False).get_template("report.md.j2").render(_context(report))


def render_html(report: Report) -> str:
    """The report as one HTML page that needs nothing from outside itself."""
    context = _context(report)
    bands = [
        svg.Band(
            band.from_s, band.to_s, f"u-{band.use}", f"{band.use}, {format_duration(band.to_s - band.from_s)}"
        )
        for band in report.series.uses
    ]
    context["timeline"] = Markup(
        svg.timeline_plot(
            _panels(report),
            _end_s(report),
            _marks(context["decisions"], context["resizes"]),
            bands,
            "Power, throughput, efficiency, workers, share and loss over time",
        )
    )
    context["use_bar"] = Markup(
        svg.stacked_bar(
            [
                (row["use"], f"u-{row['use']}", row["energy_j"] or 0.0, format_energy(row["energy_j"]))
                for row in context["use_rows"]
            ],
            "Energy by use",
        )
    )
    return _environment(is_html=True).get_template("report.html.j2").render(context)


_RENDERERS = {"json": render_json, "markdown": render_markdown, "html": render_html}


def write_report(
    run_folder: Path | str, formats: Sequence[str] = ("json", "markdown", "html")
) -> dict[str, Path]:
    """Build the report of a run and write it into the run's folder, each file at once or not at all.

    Args:
        run_folder: The run's folder.
        formats: Of ``json``, ``markdown`` and ``html``.

    Returns:
        The files by format.

    Raises:
        ConfigError: As :func:`build_report`.
        ValueError: A format that does not exist.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"no such report format: {', '.join(unknown)}; there are {', '.join(FORMATS)}")
    folder = Path(run_folder)
    report = build_report(folder)
    written: dict[str, Path] = {}
    for name in formats:
        path = folder / FORMATS[name]
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            draft.write_text(_RENDERERS[name](report), encoding="utf-8")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        written[name] = path
    return written
