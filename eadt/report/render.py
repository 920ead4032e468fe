"""A report as JSON, Markdown or one self-contained HTML page, and the files of it.

Owns the wording and the look. Every number gets its unit, every energy its quality and its uncertainty, and
what is not known is shown as *not measured*, never as zero.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from eadt.record.figures import Binned, DeviceTally, SessionTally
from eadt.record.rows import USES
from eadt.report import svg, words
from eadt.report.document import Change, Decision, Report, Setting, build_report
from eadt.units import (
    NOT_MEASURED,
    Quantity,
    format_bytes,
    format_duration,
    format_energy,
    format_qualities,
    format_quantity,
)

FORMATS = {"json": "report.json", "markdown": "report.md", "html": "report.html"}
"""Formats and the names of their files."""

_USE_MEANINGS = {
    "startup": "from the start of a session to its first step",
    "useful": "steps that count",
    "validation": "measuring the validation loss",
    "input": "waiting for data",
    "change": "changing the setting, recovering",
    "checkpoint": "saving",
    "idle": "paused, parked, or a device without work",
    "lost": "steps that a fault undid",
}
_MOST_COLOURED_CARDS = 4
"""More cards than these (and cpu, dram) have no colours of their own in the plot of power."""

_MOST_SENTENCES = 8
"""Cards of which is said in a sentence that they were slowed."""

_SHORTEST_GAP_S = 0.5
"""A shorter gap (s) is not shaded in the plot."""


def _is_change(decision: Decision) -> bool:
    return decision.setpoint_after is not None and decision.setpoint_before != decision.setpoint_after


def _end_s(report: Report) -> float:
    return max([*(to_s for _, to_s, _ in report.series.uses), report.run.wall_s, 1.0])


def _change_text(item: Change) -> str:
    return words.change(item.model_dump())


def _session_end(session: SessionTally) -> str:
    """How a session ended, in words."""
    if session.status == "running":
        return "goes on"
    if session.status in ("no word", "crashed"):
        return f"ended without a word, last heard of at {words.moment(session.heard_unix_s)}"
    text = f"{session.status} at {words.moment(session.heard_unix_s)}"
    return f"{text}: {session.reason}" if session.reason else text


# -- plots --------------------------------------------------------------------------------------------------


def _marks(
    decisions: Sequence[tuple[str, Decision]], carried_out: Sequence[tuple[str, Change]]
) -> list[svg.Mark]:
    marks = [
        svg.Mark(
            decision.at_s,
            tag,
            "decision",
            f"{tag} {decision.action} at {format_duration(decision.at_s)}: "
            f"{words.difference(decision.setpoint_before, decision.setpoint_after)} ({decision.outcome})",
            lane=0,
        )
        for tag, decision in decisions
        if _is_change(decision) and decision.at_s is not None
    ]
    return marks + [
        svg.Mark(
            item.at_s,
            tag,
            "recovery" if item.recovery else "change",
            f"{tag} {item.kind} at {format_duration(item.at_s)}: {_change_text(item)}",
            lane=1,
        )
        for tag, item in carried_out
    ]


def _power_lines(power: Binned, end_s: float) -> list[svg.Line]:
    """A line for each component and for the total; many cards share a colour and an entry of the legend."""
    components = [name for name in power.values if name != "total"]
    cards = [name for name in components if name.startswith("gpu")]
    others = [name for name in components if name not in cards]
    named = [(name, name) for name in [*others, *cards]]
    if len(cards) > _MOST_COLOURED_CARDS:
        legend = f"{cards[0]} to {cards[-1]}"
        named = [(name, name) for name in others]
        named += [(name, legend if name == cards[0] else "") for name in cards]
    lines = []
    for place, (name, legend) in enumerate(named):
        is_one_of_many = len(cards) > _MOST_COLOURED_CARDS and name in cards
        colour = len(others) if is_one_of_many else place
        lines.append(_binned_line(legend, f"c-{colour % 6 + 1}", power, end_s, name))
    if len(components) != 1:
        lines.append(_binned_line("total", "c-total", power, end_s))
    return lines


def _middles(binned: Binned, end_s: float) -> list[float]:
    """The middle of each bin on the time axis; the last bin may be cut off by the end."""
    num = max((len(values) for values in binned.values.values()), default=0)
    starts = [place * binned.bin_s for place in range(num)]
    return [(start + min(start + binned.bin_s, max(end_s, start))) / 2 for start in starts]


def _binned_line(name: str, css: str, binned: Binned, end_s: float, key: str = "total") -> svg.Line:
    values = binned.values.get(key, ())
    return svg.Line(name, css, _middles(binned, end_s)[: len(values)], values)


def _panels(report: Report) -> list[svg.Panel]:
    series, end_s = report.series, _end_s(report)
    total = report.energy_j.total
    label = format_qualities(total.qualities) if total is not None else NOT_MEASURED
    gaps = [
        (
            gap.at_s,
            gap.at_s + gap.seconds,
            f"{gap.component} on {gap.node}: {gap.reason}, {format_duration(gap.seconds)}",
        )
        for gap in report.energy_j.not_measured.longest
        if gap.seconds >= _SHORTEST_GAP_S
    ]
    settings_at_s = [at_s for at_s, _ in series.settings]

    def settings_line(name: str, css: str, key: str) -> svg.Line:
        found = [setpoint.get(key) for _, setpoint in series.settings]
        values = [float(value) if isinstance(value, int | float) else None for value in found]
        return svg.Line(name, css, settings_at_s, values, steps=True)

    losses = [_loss_line("training", "c-1", series.loss.points)]
    if series.validation_loss.points:
        losses.append(_loss_line("validation", "c-2", series.validation_loss.points, dots=True))
    has_steps = bool(series.loss.points)
    nothing = svg.Line("nothing", "c-1", [], [])
    return [
        svg.Panel(
            f"Power, W ({label})",
            _power_lines(series.power_w, end_s),
            NOT_MEASURED,
            height=150,
            shaded=gaps,
        ),
        svg.Panel(
            "Throughput, samples/s",
            [_binned_line("throughput", "c-1", series.samples_per_second, end_s) if has_steps else nothing],
            "no step has ended",
        ),
        svg.Panel(
            f"Efficiency, samples/J ({label})",
            [_binned_line("efficiency", "c-3", series.samples_per_joule, end_s) if has_steps else nothing],
            NOT_MEASURED if has_steps else "no step has ended",
        ),
        svg.Panel(
            "Active workers",
            [settings_line("workers", "c-4", "num_workers")],
            "not known",
            height=70,
            whole=True,
        ),
        svg.Panel(
            "Share of each engine, % of its device",
            [settings_line("share", "c-2", "mps_active_thread_percentage")],
            "not known",
            height=70,
            at_most=100.0,
        ),
        svg.Panel("Loss", losses, "no step has ended", height=110, from_zero=False),
    ]


def _loss_line(
    name: str, css: str, points: Sequence[tuple[int, float, float | None]], *, dots: bool = False
) -> svg.Line:
    return svg.Line(name, css, [at_s for _, at_s, _ in points], [loss for _, _, loss in points], dots=dots)


# -- tables -------------------------------------------------------------------------------------------------


def _use_css(use: str) -> str:
    return f"u-{use}" if use in USES else "u-other"


def _use_rows(report: Report) -> list[dict[str, Any]]:
    energy = report.energy_j
    total_j = energy.total.value if energy.total is not None else 0.0
    rows = []
    for use, part in energy.by_use.items():
        rows.append(
            {
                "use": use,
                "css": _use_css(use),
                "meaning": _USE_MEANINGS.get(use, "not a use that this version knows"),
                "energy": part,
                "percentage": 100 * part.value / total_j if part is not None and total_j else None,
                "shared_out": _shared_out(energy.shared_out[use], part),
                "quality": format_qualities(part.qualities) if part is not None and part.value else "",
                "seconds": report.seconds_by_use[use],
            }
        )
    return rows


def _shared_out(shared_j: float, part: Quantity | None) -> str:
    """How much of a use's energy a model gave it; empty for none."""
    if not shared_j or part is None:
        return ""
    return "all of it shared out" if shared_j >= part.value else f"{format_energy(shared_j)} of it shared out"


def _energy_remarks(report: Report) -> list[str]:
    """What a reader of the energies must know, in sentences."""
    energy, remarks = report.energy_j, []
    missing = energy.not_measured
    if missing.num_gaps:
        bound = ", so the total and what is made from it are lower bounds" if _is_bound(energy.total) else ""
        remarks.append(
            f"Not measured: {format_duration(missing.component_seconds)} of component time "
            f"({100 * missing.fraction:.2f} %) in {words.plural(missing.num_gaps, 'gap')}. "
            f"The energy in them is unknown and counted nowhere{bound}."
        )
    shared_out_j = sum(energy.shared_out.values())
    if shared_out_j:
        remarks.append(
            f"Shared out: {format_energy(shared_out_j)} were given to their uses by a model, not by a "
            "reading: waiting for data, building ahead beside training, phases too short to be read apart."
        )
    if energy.foreign:
        cards = ", ".join(f"{name} ({format_energy(part)})" for name, part in energy.foreign.items())
        remarks.append(
            f"Other programs ran on cards of this run too: {cards}. What they drew cannot be told apart "
            "and is in the total."
        )
    if energy.shared_machine_s:
        remarks.append(
            f"Shared machines: in {format_duration(energy.shared_machine_s)} of node time others trained "
            "there too; of the CPU and DRAM energy of that time only this run's share is in the total."
        )
    return remarks


def _is_bound(total: Quantity | None) -> bool:
    return total is not None and total.at_least


def _setting_row(part: Setting) -> dict[str, Any]:
    return {
        "number": part.number,
        "session": part.session,
        "name": words.setpoint(part.setpoint) if part.setpoint is not None else "before the first setting",
        "seconds": part.seconds,
        "energy": format_energy(part.energy_j),
        "useful": format_energy(part.useful_j),
        "num_steps": part.num_steps,
        "samples": part.samples,
        "per_sample": words.number(part.joules_per_sample, "J/sample") if part.samples else "",
    }


def _device_row(device: DeviceTally, hostname: str) -> dict[str, Any]:
    memory = NOT_MEASURED
    if device.memory_used_bytes is not None:
        memory = format_bytes(device.memory_used_bytes)
        if device.memory_total_bytes is not None:
            memory += f" of {format_bytes(device.memory_total_bytes)}"
    return {
        "name": f"{device.component} on {hostname}",
        "busy": NOT_MEASURED
        if device.utilisation_fraction is None
        else words.percentage(device.utilisation_fraction),
        "memory": memory,
        "temperature": NOT_MEASURED if device.temperature_c is None else f"{device.temperature_c:.0f} °C",
        "clock": NOT_MEASURED if device.sm_clock_mhz is None else f"{device.sm_clock_mhz:.0f} MHz",
        "slowed": words.throttle_reasons(device.throttled),
        "others": words.count(device.foreign_processes),
        "seconds": device.seconds,
    }


def _device_sentences(report: Report, hostnames: Mapping[str, str]) -> list[str]:
    """Which cards were slowed, how often and why; the worst first."""
    slowed = [device for device in report.devices if words.throttle_reasons(device.throttled)]
    slowed.sort(key=lambda device: -max(device.throttled.values()))
    sentences = [
        words.throttling(f"{device.component} on {hostnames.get(device.node, device.node)}", device.throttled)
        for device in slowed[:_MOST_SENTENCES]
    ]
    if len(slowed) > _MOST_SENTENCES:
        num_more = len(slowed) - _MOST_SENTENCES
        sentences.append(f"so {'was' if num_more == 1 else 'were'} {words.plural(num_more, 'more card')}")
    return sentences


def _left_out(report: Report, kind: str, num_shown: int) -> str:
    """That a list holds not all rows of a kind; empty where it does."""
    num_more = report.ledger.num_by_kind.get(kind, 0) - num_shown
    return f"{words.count(num_more)} more are in the ledger." if num_more > 0 else ""


def _source_rows(report: Report) -> list[dict[str, Any]]:
    rows = []
    for node in report.nodes:
        counts = ((node.num_gpus, "GPU"), (node.num_cores, "core"))
        machine = ", ".join(words.plural(num, noun) for num, noun in counts if num is not None)
        components = node.components or ({"component": "", "source": "nothing can be measured"},)
        for place, item in enumerate(components):
            error, resolution_s = item.get("relative_uncertainty"), item.get("resolution_s")
            rows.append(
                {
                    "node": node.hostname or node.node,
                    "machine": machine,
                    "first": place == 0,
                    "component": item["component"],
                    "source": item["source"],
                    "quality": item.get("quality") or "cannot be measured",
                    "detail": item.get("detail", ""),
                    "error": "not stated" if error is None else f"± {100 * error:.3g} %",
                    "resolution": "" if not resolution_s else format_duration(resolution_s),
                }
            )
    return rows


def _not_metered(report: Report) -> list[str]:
    """Why sources are not used, each reason once, with the nodes on which it holds."""
    nodes: dict[str, list[str]] = {}
    for node in report.nodes:
        for text in node.not_metered:
            nodes.setdefault(text, []).append(node.hostname or node.node)
    return [f"{text} ({words.listed(names, 4)})" for text, names in nodes.items()]


def _trend(first: float | None, last: float | None) -> str:
    """From the first to the last value; one value alone is one value."""
    if last is None:
        return NOT_MEASURED
    return words.number(last) if first is None else f"{words.number(first)} → {words.number(last)}"


def _tiles(report: Report) -> list[dict[str, str]]:
    total, loss = report.energy_j.total, report.loss
    label = format_qualities(total.qualities) if total is not None else ""
    has_validation = loss.validation_last is not None
    first, last = (loss.validation_first, loss.validation_last) if has_validation else (loss.first, loss.last)
    num_changes = sum(not item.recovery for item in report.changes)
    num_recoveries = len(report.changes) - num_changes
    useful = report.useful_joules_per_sample
    per_sample_note = f"{format_quantity(useful, 'J', brief=True)} of it useful work" if useful else label
    return [
        {"value": format_quantity(total, "J"), "name": "energy", "note": label},
        {
            "value": format_quantity(report.joules_per_sample, "J"),
            "name": "energy per sample",
            "note": per_sample_note,
        },
        {"value": format_quantity(report.mean_power_w, "W"), "name": "mean power", "note": label},
        {
            "value": words.number(report.samples_per_second, "samples/s")
            if report.samples_per_second is not None
            else "no samples yet",
            "name": "throughput",
            "note": "whole job, over all time",
        },
        {
            "value": words.count(report.optimizer_steps),
            "name": "optimizer steps",
            "note": f"{words.count(report.lost_steps)} lost" if report.lost_steps else "none lost",
        },
        {
            "value": _trend(first, last),
            "name": "validation loss" if has_validation else "training loss",
            "note": "first → last" if first is not None else "one value" if last is not None else "",
        },
        {
            "value": words.count(num_changes),
            "name": "changes of the setting",
            "note": words.plural(num_recoveries, "recover" + ("y" if num_recoveries == 1 else "ie"))
            if num_recoveries
            else "no recovery",
        },
        {
            "value": format_duration(report.run.wall_s),
            "name": "time",
            "note": f"{report.run.num_sessions} sessions" if report.run.num_sessions > 1 else "one session",
        },
    ]


def _context(report: Report) -> dict[str, Any]:
    hostnames = {node.node: node.hostname or node.node for node in report.nodes}
    decisions = [(f"D{place}", decision) for place, decision in enumerate(report.decisions, start=1)]
    carried_out = _tagged(report.changes)
    return {
        "report": report,
        "run": report.run,
        "energy": report.energy_j,
        "hostname": lambda node: hostnames.get(node, node),
        "tiles": _tiles(report),
        "use_rows": _use_rows(report),
        "uses": USES,
        "band_uses": [
            (use, _use_css(use))
            for use in report.energy_j.by_use
            if any(band == use for _, _, band in report.series.uses)
        ],
        "energy_remarks": _energy_remarks(report),
        "settings": [_setting_row(part) for part in report.settings],
        "decisions": decisions,
        "changes": [(tag, decision) for tag, decision in decisions if _is_change(decision)],
        "holds": [(tag, decision) for tag, decision in decisions if not _is_change(decision)],
        "carried_out": carried_out,
        "change_text": _change_text,
        "show_sessions": len(report.sessions) > 1 or report.run.status == "crashed",
        "session_end": _session_end,
        "devices": [
            _device_row(device, hostnames.get(device.node, device.node)) for device in report.devices
        ],
        "device_sentences": _device_sentences(report, hostnames),
        "left_out": lambda kind, shown: _left_out(report, kind, len(shown)),
        "sources": _source_rows(report),
        "not_metered": _not_metered(report),
        "damage": report.ledger.damage,
        "ledger_text": _ledger_text(report),
        "config_text": yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True),
    }


def _tagged(changes: Sequence[Change]) -> list[tuple[str, Change]]:
    """Changes with C1, C2 and so on, recoveries with R1, R2."""
    counts = {"C": 0, "R": 0}
    tagged = []
    for item in changes:
        letter = "R" if item.recovery else "C"
        counts[letter] += 1
        tagged.append((f"{letter}{counts[letter]}", item))
    return tagged


def _ledger_text(report: Report) -> str:
    ledger = report.ledger
    text = f"{words.plural(ledger.num_rows, 'row')} in {words.plural(ledger.num_files, 'ledger file')}"
    if ledger.num_dropped:
        twice = words.plural(ledger.num_dropped, "row")
        text += f"; {twice} delivered twice {'was' if ledger.num_dropped == 1 else 'were'} counted once"
    return text


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
        "figure": format_quantity,
        "duration": format_duration,
        "bytes": lambda value: "" if value is None else format_bytes(value),
        "count": words.count,
        "qualities": format_qualities,
        "moment": words.moment,
        "pairs": words.pairs,
        "sentence": words.sentence,
        "unbroken": words.unbroken,
        "words": lambda value: str(value).replace("_", " "),
        "cell": words.cell,
    }
    environment.globals["difference"] = words.difference
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
        svg.Band(from_s, to_s, _use_css(use), f"{use}, {format_duration(to_s - from_s)}")
        for from_s, to_s, use in report.series.uses
    ]
    context["timeline"] = Markup(
        svg.timeline_plot(
            _panels(report),
            _end_s(report),
            _marks(context["decisions"], context["carried_out"]),
            bands,
            "Power, throughput, efficiency, workers, share and loss over time",
        )
    )
    context["use_bar"] = Markup(
        svg.stacked_bar(
            [
                (use, _use_css(use), part.value, format_quantity(part, "J"))
                for use, part in report.energy_j.by_use.items()
                if part is not None
            ],
            "Energy by use",
        )
    )
    return _environment(is_html=True).get_template("report.html.j2").render(context)


_RENDERERS: dict[str, Callable[[Report], str]] = {
    "json": render_json,
    "markdown": render_markdown,
    "html": render_html,
}


def write_report(
    run_folder: Path | str,
    formats: Sequence[str] = ("json", "markdown", "html"),
    report: Report | None = None,
) -> dict[str, Path]:
    """Write the report of a run into the run's folder, each file at once or not at all.

    Args:
        run_folder: The run's folder.
        formats: Of ``json``, ``markdown`` and ``html``.
        report: The report; ``None``: it is built.

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
    report = build_report(folder) if report is None else report
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
