"""What a run shows while it trains: a live view on a terminal, plain lines everywhere else.

Driven by event dictionaries alone (``EnergyAdaptiveTrainer(on_event=...)``), so it knows nothing of Ray or
of the run's objects, and it computes no figure: joules per sample, energy used and to go, power and rate are
those of :class:`~eadt.record.status.RunStatus`, which are the report's. A display never stops training: an
event that it cannot show is logged and left out. Its methods are thread-safe and block for the terminal only.

Events, by their ``type``:

==============  =======================================================================================
``phase``       ``text``: what the run is about to do.
``progress``    ``status``: the run's :class:`~eadt.record.status.RunStatus`, about once a second.
``decision``    A row of :mod:`eadt.record.rows` as :func:`~eadt.record.rows.as_event` gives it: its fields
``change``      by their names there. A ``decision`` with the ``decision_id`` of an earlier one takes its
``validation``  place.
``checkpoint``
``fault``
``note``
==============  =======================================================================================

Events of other types are left out.
"""

from __future__ import annotations

import logging
import textwrap
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.record.status import OVER, RunStatus
from eadt.report import words
from eadt.units import Quantity, format_bytes, format_duration, format_quantity

_LOG = logging.getLogger(__name__)

Event = Mapping[str, Any]

PLAIN_INTERVAL_S = 10.0
"""Least time in s between two progress lines of the plain display."""

_NUM_SHOWN = 4
_KINDS = {"in_place": "in place", "group": "by a new worker group", "restart": "by a restart"}
_OUTCOME_STYLES = {
    "pending": "yellow",
    "kept": "green",
    "reverted": "magenta",
    "held": "dim",
    "failed": "red",
    "refused": "dim",
}
_LINE_STYLES = {"fault": "bold red", "note": "yellow", "validation": "cyan", "checkpoint": "dim"}


class RunDisplay(Protocol):
    """Shows the events of one run, between its ``__enter__`` and ``__exit__``."""

    def __enter__(self) -> Self:
        """Begin to show."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen and stop. Idempotent."""
        ...

    def handle(self, event: Event) -> None:
        """Show one event. Never raises."""
        ...


def make_display(
    console: Console,
    name: str,
    *,
    plain: bool = False,
    clock: Clock = SYSTEM_CLOCK,
) -> RunDisplay:
    """The live display where the console is a terminal that can redraw, else the plain one.

    Args:
        console: Where to show it.
        name: Name of the run.
        plain: Show plain lines on a terminal too.
        clock: Source of the elapsed time.
    """
    if plain or not console.is_terminal or console.is_dumb_terminal:
        return PlainDisplay(console, clock=clock)
    return LiveDisplay(console, name, clock=clock)


# -- events as one line of text ---------------------------------------------------------------------------


def describe(event: Event) -> str | None:
    """One event as one line of text; ``None`` for one that has nothing to say."""
    describer = _DESCRIBERS.get(str(event.get("type")))
    return describer(event) if describer else None


def _one_line(text: Any) -> str:
    """The first line of a text that may hold an engine's whole output."""
    first, _, rest = str(text or "").strip().partition("\n")
    return f"{first} ..." if rest else first


def _quantity(quantity: Quantity, unit: str, *, with_quality: bool = False) -> str:
    text = format_quantity(quantity, unit, brief=True)
    return f"{text} ({' + '.join(quantity.qualities)})" if with_quality and quantity.qualities else text


def progress_parts(status: RunStatus) -> dict[str, str]:
    """The figures of a run as text with units, by name; what is not known is left out, but for power."""
    parts = {}
    if status.loss is not None:
        parts["loss"] = f"{status.loss:.4f}"
    if status.samples_per_second is not None:
        parts["speed"] = f"{status.samples_per_second:.1f} samples/s"
    if status.power_w is not None:
        parts["power"] = _quantity(status.power_w, "W", with_quality=True)
    elif status.status not in OVER:
        parts["power"] = "power not measured"
    if status.joules_per_sample is not None:
        parts["efficiency"] = _quantity(status.joules_per_sample, "J/sample")
    if status.setpoint is not None:
        parts["setting"] = words.setpoint(status.setpoint)
    if status.energy_j is not None:
        parts["energy"] = f"{_quantity(status.energy_j, 'J')} used"
    left = []
    if status.seconds_to_go is not None:
        is_near = status.seconds_to_go < 10
        left.append("a few seconds" if is_near else format_duration(round(status.seconds_to_go)))
    if status.energy_to_go_j is not None:
        left.append(_quantity(status.energy_to_go_j, "J"))
    if left:
        parts["left"] = " and ".join(left) + " to go"
    return {name: text for name, text in parts.items() if text}


def step_text(status: RunStatus) -> str:
    """How far a run is: ``step 120/600``."""
    return f"step {status.step}" + (f"/{status.max_steps}" if status.max_steps else "")


def _progress_line(event: Event) -> str:
    status: RunStatus = event["status"]
    parts = progress_parts(status)
    if "loss" in parts:
        parts["loss"] = f"loss {parts['loss']}"
    return ", ".join([step_text(status), *parts.values()])


def _decision_line(event: Event) -> str | None:
    if int(event.get("repeats") or 1) > 1:
        return None  # the hold that was shown, once more
    before, after = event.get("setpoint_before"), event.get("setpoint_after")
    outcome = str(event.get("outcome") or "pending")
    verdict = _verdict(event)
    head = f"decision {event.get('decision_id', '')}".rstrip()
    action = str(event.get("action", "")).replace("_", " ")
    if verdict and outcome not in ("pending", "held"):
        return f"{head} ({action}): {verdict}"
    change = f" {words.setpoint(before)} → {words.setpoint(after)}" if before != after else ""
    text = f"{head}: {action}{change}" + ("" if outcome in ("pending", "held") else f" ({outcome})")
    reason = str(event.get("reason") or "")
    expected = event.get("expected")
    summary = str(expected.get("summary") or "") if isinstance(expected, Mapping) else ""
    text += f": {reason}" if reason else ""
    return text + (f" Expected: {summary}" if summary and outcome == "pending" else "")


def _verdict(event: Event) -> str:
    measured = event.get("measured")
    return str(measured.get("verdict") or "") if isinstance(measured, Mapping) else ""


def _change_line(event: Event) -> str:
    text = "recovery: " if event.get("recovery") else "change: "
    text += words.change(event)
    text += f" {_KINDS.get(str(event.get('kind')), str(event.get('kind') or ''))}".rstrip()
    seconds = event.get("seconds")
    if isinstance(seconds, int | float):
        text += f", pause {format_duration(seconds)}"
    lost = event.get("lost_steps")
    if lost is not None:
        text += ", no step lost" if lost == 0 else f", {words.plural(lost, 'step')} lost"
    return text


def _validation_line(event: Event) -> str | None:
    loss = event.get("loss")
    return f"validation loss {loss:.4f} at step {event.get('step')}" if loss is not None else None


def _checkpoint_line(event: Event) -> str:
    kind = str(event.get("kind") or "").replace("_", "-")
    text = " ".join(part for part in (kind, "checkpoint") if part) + f" at step {event.get('step')}"
    details = []
    if isinstance(event.get("num_bytes"), int | float):
        details.append(format_bytes(event["num_bytes"]))
    if isinstance(event.get("seconds"), int | float):
        details.append(f"in {format_duration(event['seconds'])}")
    return text + (f": {' '.join(details)}" if details else "")


def _fault_line(event: Event) -> str:
    node = f" on node {str(event['node'])[:12]}" if event.get("node") else ""
    detail = f": {_one_line(event['detail'])}" if event.get("detail") else ""
    return f"fault: {event.get('kind')}{node}{detail}"


def _note_line(event: Event) -> str:
    code, text = str(event.get("code") or ""), _one_line(event.get("text"))
    return f"note {code}: {text}" if code and not text.startswith(code) else f"note: {text}"


_DESCRIBERS: dict[str, Any] = {
    "phase": lambda event: str(event.get("text") or "") or None,
    "progress": _progress_line,
    "decision": _decision_line,
    "change": _change_line,
    "validation": _validation_line,
    "checkpoint": _checkpoint_line,
    "fault": _fault_line,
    "note": _note_line,
}


# -- what keeps a number beside its unit on a narrow terminal -----------------------------------------------

_LEAST_BESIDE_LEAD = 24


class _Wrapped:
    """Text that is wrapped between words, but never between a number and its unit.

    Args:
        text: What is wrapped.
        style: Its style.
        lead: Stands before it in the first line, in styles of its own.
    """

    def __init__(self, text: str, style: str = "", lead: Text | None = None) -> None:
        self._text = words.unbroken(text)  # textwrap breaks no no-break space
        self._style = style
        self._lead = lead or Text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lead = self._lead
        width = max(options.max_width, 1)
        lines = textwrap.wrap(self._text, width, initial_indent="_" * lead.cell_len)
        if lead and (not lines or lead.cell_len + _LEAST_BESIDE_LEAD > width):
            yield lead
            lead, lines = Text(), textwrap.wrap(self._text, width)
        for place, line in enumerate(lines):
            first = lead if place == 0 else Text()
            rest = line[first.cell_len :].replace(words.NO_BREAK, " ")
            yield Text.assemble(first, (rest, self._style), no_wrap=True, overflow="ellipsis")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max((cell_len(word) for word in self._text.split(" ")), default=0)
        whole = self._lead.cell_len + cell_len(self._text)
        return Measurement(longest, max(whole, longest)).with_maximum(options.max_width)


class _Cells:
    """Short texts under their heads, as many beside each other as fit; none is broken."""

    _GAP = 3

    def __init__(self, cells: Sequence[tuple[str, str]]) -> None:
        self._cells = cells

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line: list[tuple[str, str]] = []
        taken = 0
        for head, value in self._cells:
            width = max(cell_len(head), cell_len(value))
            if line and taken + self._GAP + width > options.max_width:
                yield self._line(line)
                line, taken = [], 0
            taken += width + (self._GAP if line else 0)
            line.append((head, value))
        if line:
            yield self._line(line)

    def _line(self, cells: Sequence[tuple[str, str]]) -> Table:
        table = Table.grid(padding=(0, self._GAP, 0, 0))
        for _ in cells:
            table.add_column(no_wrap=True)
        table.add_row(*(Text(head, style="dim") for head, _ in cells))
        table.add_row(*(Text(value, style="bold") for _, value in cells))
        return table


def _clock_text(seconds: float) -> str:
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


# -- the two displays ---------------------------------------------------------------------------------------


class _Display:
    """What both displays share: the lock, the elapsed time, and never raising."""

    def __init__(self, console: Console, clock: Clock) -> None:
        self.console = console
        self._clock = clock
        self._lock = threading.RLock()
        self._started_s: float | None = None

    def handle(self, event: Event) -> None:
        """See :class:`RunDisplay`."""
        try:
            with self._lock:
                line = self._take(event)
            # Printed without the lock: rich draws the panel, which needs it, under a lock of its own.
            if line is not None:
                self.console.print(line, soft_wrap=True)
        except Exception:
            _LOG.warning("an event could not be shown: %r", event, exc_info=True)

    def _take(self, event: Event) -> Text | None:
        """Take note of an event; returns the line to print, if there is one."""
        raise NotImplementedError

    def _elapsed(self) -> str:
        now_s = self._clock.monotonic_s()
        if self._started_s is None:
            self._started_s = now_s
        return _clock_text(now_s - self._started_s)


class PlainDisplay(_Display):
    """One line an event; progress at most every so many seconds, and at the last step.

    Args:
        console: Where to write.
        interval_s: Least time in s between two progress lines.
        clock: Source of the elapsed time.
    """

    def __init__(
        self, console: Console, *, interval_s: float = PLAIN_INTERVAL_S, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        super().__init__(console, clock)
        self._interval_s = interval_s
        self._last_progress_s: float | None = None
        self._last_step: int | None = None
        self._last_line: dict[str, str] = {}

    def __enter__(self) -> Self:
        """See :class:`RunDisplay`."""
        self._elapsed()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See :class:`RunDisplay`."""

    def _take(self, event: Event) -> Text | None:
        kind = str(event.get("type"))
        if kind == "progress" and not self._is_due(event["status"]):
            return None
        line = describe(event)
        if line is None or (kind in ("phase", "decision") and self._last_line.get(kind) == line):
            return None
        self._last_line[kind] = line
        return Text(f"[{self._elapsed():>5}] {line}")

    def _is_due(self, status: RunStatus) -> bool:
        now_s = self._clock.monotonic_s()
        is_last = status.max_steps is not None and status.step == status.max_steps
        if is_last and status.step == self._last_step:
            return False
        recent = self._last_progress_s is not None and now_s - self._last_progress_s < self._interval_s
        if recent and not is_last:
            return False
        self._last_progress_s, self._last_step = now_s, status.step
        return True


class LiveDisplay(_Display):
    """A panel that is redrawn in place; what should stay readable afterwards is printed above it.

    Args:
        console: A terminal.
        name: Name of the run.
        clock: Source of the elapsed time.
    """

    def __init__(self, console: Console, name: str, *, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(console, clock)
        self._name = name
        self._phase = "starting"
        self._spinner: Spinner | None = Spinner("dots", style="cyan")
        self._status: RunStatus | None = None
        self._decisions: dict[str, tuple[str, Event]] = {}
        self._changes: deque[tuple[str, str]] = deque(maxlen=_NUM_SHOWN)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        """See :class:`RunDisplay`."""
        self._elapsed()
        self._live = Live(
            get_renderable=self.render, console=self.console, refresh_per_second=4, transient=False
        )
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See :class:`RunDisplay`."""
        if self._live is not None:
            self._spinner = None
            self._live.stop()
            self._live = None

    def _take(self, event: Event) -> Text | None:
        kind = event.get("type")
        if kind == "phase":
            self._phase = str(event.get("text") or self._phase)
        elif kind == "progress":
            self._status = event["status"]
        elif kind == "decision":
            key = str(event.get("decision_id"))
            since = self._decisions[key][0] if key in self._decisions else self._elapsed()
            self._decisions[key] = (since, dict(event))
            while len(self._decisions) > _NUM_SHOWN:
                del self._decisions[next(iter(self._decisions))]
        elif kind == "change":
            self._changes.append((self._elapsed(), _change_line(event).removeprefix("change: ")))
        else:
            line = describe(event)
            if line is not None:
                return Text(f"[{self._elapsed():>5}] {line}", style=_LINE_STYLES.get(str(kind), ""))
        return None

    def render(self) -> RenderableType:
        """The panel as it is now."""
        with self._lock:
            parts: list[RenderableType] = [self._phase_row()]
            if self._status is not None:
                parts += [self._bar_row(self._status), self._numbers(self._status)]
            if self._decisions:
                parts.append(self._decision_table())
            if self._changes:
                parts.append(self._change_table())
            title = Text(f" {self._name} · {self._elapsed()} ", style="bold")
            return Panel(Group(*parts), title=title, title_align="left", border_style="cyan", padding=(0, 1))

    def _phase_row(self) -> RenderableType:
        text = Text(self._phase, overflow="ellipsis", no_wrap=True)
        if self._spinner is None:
            return text
        row = Table.grid(padding=(0, 1))
        row.add_row(self._spinner, text)
        return row

    def _bar_row(self, status: RunStatus) -> RenderableType:
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        left = Text(progress_parts(status).get("left", ""), style="bold")
        bar = ProgressBar(total=status.max_steps, completed=status.step) if status.max_steps else Text("")
        row.add_row(Text(step_text(status), style="bold"), bar, left)
        return row

    def _numbers(self, status: RunStatus) -> RenderableType:
        parts = progress_parts(status)
        names = {
            "loss": "loss",
            "speed": "throughput",
            "power": "power",
            "efficiency": "energy",
            "setting": "setting",
            "energy": "so far",
        }
        return _Cells([(head, parts[name]) for name, head in names.items() if name in parts])

    def _decision_table(self) -> RenderableType:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        for since, event in self._decisions.values():
            outcome = str(event.get("outcome") or "pending")
            before, after = event.get("setpoint_before"), event.get("setpoint_after")
            action = str(event.get("action", "")).replace("_", " ")
            style = _OUTCOME_STYLES.get(outcome, "")
            lead = Text.assemble((action, "bold"), "  ", (outcome, style), "  ")
            change = f"{words.setpoint(before)} → {words.setpoint(after)}" if before != after else ""
            reason = _Wrapped(_verdict(event) or _one_line(event.get("reason")), style="dim")
            table.add_row(since, Group(_Wrapped(change, lead=lead), reason))
        return Group(Text("decisions", style="dim"), table)

    def _change_table(self) -> RenderableType:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        for since, text in self._changes:
            table.add_row(since, _Wrapped(text))
        return Group(Text("changes", style="dim"), table)
