"""Figures of energy: sums over accounts, with how far they can be trusted.

Owns the rules of uncertainty and of "at least". A total is uncertain by what its sources state: linear within
one piece of hardware, in quadrature between different ones. A use is uncertain also by where intervals were
cut, and by what a model shared out. It changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from eadt.record.books.energy import EnergyBook
from eadt.record.books.sessions import Session
from eadt.record.rows import MeteredComponent
from eadt.units import Quantity

ATTRIBUTES = ("use", "component", "quality", "node")
Cell = tuple[str, str, str, str]
"""Use, component, quality, node."""

AT_LEAST_FRACTION = 1e-3
"""A figure of which more of the time is unknown is "at least"."""


@dataclass(slots=True)
class Part:
    """Sums of one part: a use, a component, a quality, a node, or all."""

    energy_mj: int = 0
    is_known: bool = False
    expected_us: int = 0
    unknown_us: int = 0
    qualities: set[str] = field(default_factory=set)
    error_mj: dict[tuple[str, str], float] = field(default_factory=dict)
    has_unknown_error: bool = False
    shared_mj: int = 0
    variance_j2: float = 0.0

    def book(self, energy_mj: int, quality: str, hardware: tuple[str, str], relative: float | None) -> None:
        """Add a column of an account."""
        self.energy_mj += energy_mj
        self.is_known = True
        if energy_mj:
            self.qualities.add(quality)
            if relative is None:
                self.has_unknown_error = True
            else:
                self.error_mj[hardware] = self.error_mj.get(hardware, 0.0) + energy_mj * relative

    @property
    def is_at_least(self) -> bool:
        """Whether so much is unknown that the figure is a lower bound."""
        return is_at_least(self.unknown_us, self.expected_us)

    def quantity(self) -> Quantity:
        """In J."""
        uncertainty_j = None
        if not self.has_unknown_error:
            uncertainty_j = math.hypot(
                *(error / 1e3 for error in self.error_mj.values()),
                math.sqrt(self.variance_j2),
                self.shared_mj / 1e3,
            )
        return Quantity(self.energy_mj / 1e3, uncertainty_j, self.is_at_least, tuple(sorted(self.qualities)))


@dataclass(slots=True)
class Totals:
    """All sums of the energy at one moment; ``parts`` by attribute and name."""

    all: Part
    parts: dict[str, dict[str, Part]]
    cells_mj: dict[Cell, int]
    shared_out_mj: dict[str, int]

    def part(self, attribute: str, name: str) -> Part:
        """One part, empty where it is new."""
        return self.parts[attribute].setdefault(name, Part())


def is_at_least(unknown_us: int, expected_us: int) -> bool:
    """Whether so much of the time is unknown that a figure is a lower bound."""
    return unknown_us > AT_LEAST_FRACTION * expected_us


def tabulate(book: EnergyBook, session: Session) -> Totals:
    """Sum up the accounts of all nodes."""
    totals = Totals(Part(), {attribute: {} for attribute in ATTRIBUTES}, {}, {})
    for node in book.nodes.values():
        for account in node.accounts:
            components = node.layouts[account.layout]
            num_own = len(account.uses)
            us = account.totals[account.time_column]
            if not us and not any(account.totals):
                continue  # all of it became void
            unknown_us = account.unknown_us(account.totals)
            uses_of: list[set[str]] = [{use} for use in account.uses]
            for column, use in enumerate(account.uses):
                if column not in account.nulls:
                    cell = (use, components[column].component, account.qualities[column], node.name)
                    _book(totals, cell, account.totals[column], components[column])
            for column, (number, use) in enumerate(account.shares, start=num_own):
                energy_mj = account.totals[column]
                if energy_mj:
                    cell = (use, components[number].component, account.qualities[number], node.name)
                    _book(totals, cell, energy_mj, components[number])
                    own = account.uses[number]
                    if own != use:
                        _share_out(totals, energy_mj, own, use)
                uses_of[number].add(use)
            for column, component in enumerate(components):
                names = {
                    "use": uses_of[column],
                    "component": {component.component},
                    "quality": {account.qualities[column]} - {""},
                    "node": {node.name},
                }
                _book_time(totals, us, unknown_us.get(column, 0), names)
        for use, variance_j2 in node.variance_j2.items():
            totals.part("use", use).variance_j2 += variance_j2
        _book_missing(totals, "use", node.hole_us_by_use)
        _book_missing(totals, "component", node.hole_us_by_component)
        _book_missing(totals, "quality", node.hole_us_by_quality)
        _book_missing(totals, "node", {node.name: node.hole_us})
        totals.all.expected_us += node.hole_us
        totals.all.unknown_us += node.hole_us
        # The uses of that time are not known again: its energy is in those of the time after it.
        for name, us in node.recovered_us.items():
            for part in (totals.all, totals.part("component", name), totals.part("node", node.name)):
                part.unknown_us -= us
        for quality, us in node.recovered_us_by_quality.items():
            totals.part("quality", quality).unknown_us -= us
        for component, covered_to, end_t in book.tails(node, session):
            late_us = round((end_t - covered_to) * 1e6)
            last_use = node.uses.get(component.component)
            names = {
                "use": set() if last_use is None else {last_use},
                "component": {component.component},
                "quality": {component.quality} if component.quality else set(),
                "node": {node.name},
            }
            _book_time(totals, late_us, late_us, names)
    for use, split_mj in book.split_mj.items():
        totals.part("use", use).shared_mj += split_mj
        if use == "lost":
            totals.shared_out_mj[use] = totals.shared_out_mj.get(use, 0) + split_mj
    return totals


def _book(totals: Totals, cell: Cell, energy_mj: int, component: MeteredComponent) -> None:
    _, name, quality, node = cell
    hardware = (name, component.identity) if component.identity else (name, f"of {node}")
    relative = component.relative_uncertainty
    totals.all.book(energy_mj, quality, hardware, relative)
    for attribute, part in zip(ATTRIBUTES, cell, strict=True):
        totals.part(attribute, part).book(energy_mj, quality, hardware, relative)
    totals.cells_mj[cell] = totals.cells_mj.get(cell, 0) + energy_mj


def _share_out(totals: Totals, energy_mj: int, from_use: str, to_use: str) -> None:
    """A model moved energy: by as much either use may be wrong."""
    totals.part("use", from_use).shared_mj += energy_mj
    totals.part("use", to_use).shared_mj += energy_mj
    totals.shared_out_mj[to_use] = totals.shared_out_mj.get(to_use, 0) + energy_mj


def _book_time(totals: Totals, expected_us: int, unknown_us: int, names: dict[str, set[str]]) -> None:
    totals.all.expected_us += expected_us
    totals.all.unknown_us += unknown_us
    for attribute, parts in names.items():
        for name in parts:
            part = totals.part(attribute, name)
            part.expected_us += expected_us
            part.unknown_us += unknown_us


def _book_missing(totals: Totals, attribute: str, missing_us: dict[str, int]) -> None:
    for name, us in missing_us.items():
        part = totals.part(attribute, name)
        part.expected_us += us
        part.unknown_us += us
