"""A report in a few lines of text, for the end of ``eadt run`` and for ``eadt report``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from eadt.units import format_duration, format_energy

if TYPE_CHECKING:
    from eadt.report import Report


def summary(report: Report) -> Iterator[str]:
    """The lines: what was done, what it drew, what it was for, what was changed."""
    run, energy, loss = report.run, report.energy_j, report.loss
    steps = f"{report.optimizer_steps} steps" if report.optimizer_steps != 1 else "1 step"
    yield f"{run.name}: {run.status}, {steps} in {format_duration(run.wall_s)}"
    if loss.first is not None and loss.last is not None:
        yield f"  {'loss:':<10} {loss.first:.4f} → {loss.last:.4f}{_validation(report)}"
    quality = " + ".join(energy.qualities)
    per_sample = "" if report.joules_per_sample is None else f", {report.joules_per_sample:.3g} J/sample"
    yield f"  {'energy:':<10} {format_energy(energy.total)}{f' ({quality})' if quality else ''}{per_sample}"
    parts = [f"{use} {format_energy(part)}" for use, part in energy.by_use.items() if part is not None]
    if parts:
        yield f"  {'for:':<10} {', '.join(parts)}"
    if energy.not_measured.num_gaps:
        yield f"  {'gaps:':<10} {energy.not_measured.fraction:.1%} of the time was not measured"
    if report.resizes:
        yield f"  {'changes:':<10} {_changes(report)}"
    outcomes: dict[str, int] = {}
    for decision in report.decisions:
        outcomes[decision.outcome] = outcomes.get(decision.outcome, 0) + 1
    if outcomes:
        yield f"  {'decisions:':<10} " + ", ".join(
            f"{count} {outcome}" for outcome, count in outcomes.items()
        )
    if report.partial and report.partial_reason:
        yield f"  {'partial:':<10} {report.partial_reason}"


def _validation(report: Report) -> str:
    first, last = report.loss.validation_first, report.loss.validation_last
    return "" if first is None or last is None else f"; validation {first:.4f} → {last:.4f}"


def _changes(report: Report) -> str:
    resizes = [item for item in report.resizes if item.from_workers != item.to_workers]
    parts = []
    if resizes:
        counts = [resizes[0].from_workers, *(item.to_workers for item in resizes)]
        parts.append("workers " + " → ".join(str(count) for count in counts))
    num_shares = len(report.resizes) - len(resizes)
    if num_shares:
        parts.append(f"{num_shares} change{'s' if num_shares > 1 else ''} of share")
    pauses_s = [item.seconds for item in report.resizes if item.seconds is not None]
    if pauses_s:
        parts.append(f"longest pause {format_duration(max(pauses_s))}")
    num_lost = sum(item.lost_steps or 0 for item in report.resizes)
    parts.append(f"{num_lost or 'no'} step{'s' if num_lost > 1 else ''} lost")
    return ", ".join(parts)
