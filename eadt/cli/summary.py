"""A report in a few lines of text, for the end of ``eadt run`` and for ``eadt report``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from eadt.units import format_duration, format_energy, format_qualities, format_quantity

if TYPE_CHECKING:
    from eadt.report import Report


def summary(report: Report) -> Iterator[str]:
    """The lines: what was done, what it drew, what it was for, what was changed."""
    run, energy, total = report.run, report.energy_j, report.energy_j.total
    steps = f"{report.optimizer_steps} steps" if report.optimizer_steps != 1 else "1 step"
    yield f"{run.name}: {run.status}, {steps} in {format_duration(run.wall_s)}"
    loss = _trend(report.loss.first, report.loss.last)
    validation = _trend(report.loss.validation_first, report.loss.validation_last)
    if loss:
        yield _line("loss", loss + (f"; validation {validation}" if validation else ""))
    quality = f" ({format_qualities(total.qualities)})" if total is not None else ""
    per_sample = format_quantity(report.joules_per_sample, "J/sample")
    yield _line(
        "energy",
        format_quantity(total, "J") + quality + (f", {per_sample}" if report.joules_per_sample else ""),
    )
    parts = [
        f"{use} {format_quantity(part, 'J', brief=True)}"
        for use, part in energy.by_use.items()
        if part is not None and part.value
    ]
    if parts:
        yield _line("for", ", ".join(parts))
    shared_out_j = sum(energy.shared_out.values())
    if shared_out_j:
        yield _line("of it", f"{format_energy(shared_out_j)} shared out by a model")
    if energy.not_measured.num_gaps:
        yield _line("gaps", f"{energy.not_measured.fraction:.1%} of the time was not measured")
    if report.changes:
        yield _line("changes", _changes(report))
    outcomes: dict[str, int] = {}
    for decision in report.decisions:
        outcomes[decision.outcome] = outcomes.get(decision.outcome, 0) + 1
    if outcomes:
        yield _line("decisions", ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    if report.partial and report.partial_reason:
        yield _line("partial", report.partial_reason)
    for sentence in report.ledger.damage:
        yield _line("ledger", sentence)


def _line(head: str, text: str) -> str:
    return f"  {head + ':':<10} {text}"


def _trend(first: float | None, last: float | None) -> str:
    """From the first to the last value; one value alone is one value; empty where there is none."""
    if last is None:
        return ""
    return f"{last:.4f}" if first is None else f"{first:.4f} → {last:.4f}"


def _changes(report: Report) -> str:
    changed = [item for item in report.changes if not item.recovery]
    resized = [item for item in changed if item.from_workers != item.to_workers]
    parts = []
    if resized:
        counts = [resized[0].from_workers, *(item.to_workers for item in resized)]
        parts.append("workers " + " → ".join(str(count) for count in counts))
    for number, singular, plural in (
        (len(changed) - len(resized), "other change", "other changes"),
        (len(report.changes) - len(changed), "recovery", "recoveries"),
    ):
        if number:
            parts.append(f"{number} {singular if number == 1 else plural}")
    pauses_s = [item.seconds for item in report.changes if item.seconds is not None]
    if pauses_s:
        parts.append(f"longest pause {format_duration(max(pauses_s))}")
    num_lost = sum(item.lost_steps or 0 for item in report.changes)
    parts.append(f"{num_lost or 'no'} step{'s' if num_lost > 1 else ''} lost")
    return ", ".join(parts)
