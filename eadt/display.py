"""What a run shows while it trains: a live view on a terminal, plain lines everywhere else.

Driven by the trainer's event dictionaries alone (``EnergyAdaptiveTrainer(on_event=...)``), so it knows
nothing of Ray or of the run's objects. A display never stops training: an event that it cannot show is
logged and left out. Its methods are thread-safe and block for the terminal only.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.units import format_bytes, format_duration, format_energy

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


def describe_setpoint(setpoint: Any) -> str:
    """A setpoint's dictionary as a short phrase: ``2 workers at 50 %``."""
    if not isinstance(setpoint, Mapping):
        return "?"
    parts = [_workers(setpoint.get("num_workers"), setpoint.get("mps_active_thread_percentage"))]
    limit_w = setpoint.get("power_limit_w")
    if limit_w is not None:
        parts.append(f"{limit_w:.0f} W limit")
    if setpoint.get("paused"):
        parts.append("paused")
    return ", ".join(parts)


def _one_line(text: Any) -> str:
    """The first line of a text that may hold an engine's whole output."""
    first, _, rest = str(text or "").strip().partition("\n")
    return f"{first} ..." if rest else first


def _workers(num_workers: Any, share: Any) -> str:
    if num_workers is None:
        return ""
    text = "1 worker" if num_workers == 1 else f"{num_workers} workers"
    return text if share is None else f"{text} at {share:.0f} %"


def _progress_parts(event: Event) -> dict[str, str]:
    """The quantities of a progress event as text, by name; unknown ones are left out."""
    number = {name: value for name, value in event.items() if isinstance(value, int | float)}
    parts = {}
    if "loss" in number:
        parts["loss"] = f"{number['loss']:.4f}"
    if "samples_per_second" in number:
        parts["speed"] = f"{number['samples_per_second']:.1f} samples/s"
    if "power_w" in number:
        quality = event.get("power_quality")
        parts["power"] = f"{number['power_w']:.1f} W" + (f" ({quality})" if quality else "")
    else:
        parts["power"] = "power not measured"
    if "joules_per_sample" in number:
        parts["efficiency"] = f"{number['joules_per_sample']:.3g} J/sample"
    parts["workers"] = _workers(event.get("num_workers"), event.get("share_percentage"))
    if "energy_j" in number:
        parts["energy"] = f"{format_energy(number['energy_j'])} used"
    left = []
    if "eta_s" in number:
        left.append(format_duration(round(number["eta_s"])) if number["eta_s"] >= 10 else "a few seconds")
    if "eta_energy_j" in number:
        left.append(format_energy(number["eta_energy_j"]))
    if left:
        parts["left"] = " and ".join(left) + " to go"
    return {name: text for name, text in parts.items() if text}


def _step_text(event: Event) -> str:
    step, max_steps = event.get("step"), event.get("max_steps")
    return f"step {step}" + (f"/{max_steps}" if max_steps else "")


def _progress_line(event: Event) -> str:
    parts = _progress_parts(event)
    if "loss" in parts:
        parts["loss"] = f"loss {parts['loss']}"
    return ", ".join([_step_text(event), *parts.values()])


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
    change = f" {describe_setpoint(before)} → {describe_setpoint(after)}" if before != after else ""
    text = f"{head}: {action}{change}" + ("" if outcome in ("pending", "held") else f" ({outcome})")
    reason = str(event.get("reason") or "")
    expected = event.get("expected")
    summary = str(expected.get("summary") or "") if isinstance(expected, Mapping) else ""
    text += f": {reason}" if reason else ""
    return text + (f" Expected: {summary}" if summary and outcome == "pending" else "")


def _verdict(event: Event) -> str:
    measured = event.get("measured")
    return str(measured.get("verdict") or "") if isinstance(measured, Mapping) else ""


def _resize_line(event: Event) -> str:
    before, after = event.get("setpoint_before"), event.get("setpoint_after")
    from_workers, to_workers = event.get("from_workers"), event.get("to_workers")
    share = [
        setpoint.get("mps_active_thread_percentage") if isinstance(setpoint, Mapping) else None
        for setpoint in (before, after)
    ]
    changes = []
    if from_workers != to_workers:
        changes.append(f"{from_workers} → {to_workers} workers")
    if share[0] != share[1]:
        changes.append(f"share {share[0]} → {share[1]} %")
    text = f"resize: {', '.join(changes) or 'same setpoint, new engines'}"
    text += f" {_KINDS.get(str(event.get('kind')), str(event.get('kind') or ''))}".rstrip()
    seconds = event.get("seconds")
    if isinstance(seconds, int | float):
        text += f", pause {format_duration(seconds)}"
    lost = event.get("lost_steps")
    if lost is not None:
        text += ", no step lost" if lost == 0 else f", {lost} step{'' if lost == 1 else 's'} lost"
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
    "resize": _resize_line,
    "validation": _validation_line,
    "checkpoint": _checkpoint_line,
    "fault": _fault_line,
    "note": _note_line,
}


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
        self._last_step: Any = None
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
        if kind == "progress" and not self._is_due(event):
            return None
        line = describe(event)
        if line is None or (kind in ("phase", "decision") and self._last_line.get(kind) == line):
            return None
        self._last_line[kind] = line
        return Text(f"[{self._elapsed():>5}] {line}")

    def _is_due(self, event: Event) -> bool:
        now_s = self._clock.monotonic_s()
        is_last = event.get("step") is not None and event.get("step") == event.get("max_steps")
        if is_last and event.get("step") == self._last_step:
            return False
        recent = self._last_progress_s is not None and now_s - self._last_progress_s < self._interval_s
        if recent and not is_last:
            return False
        self._last_progress_s, self._last_step = now_s, event.get("step")
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
        self._progress: Event = {}
        self._decisions: dict[str, tuple[str, Event]] = {}
        self._resizes: deque[tuple[str, str]] = deque(maxlen=_NUM_SHOWN)
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
            self._progress = dict(event)
        elif kind == "decision":
            key = str(event.get("decision_id"))
            since = self._decisions[key][0] if key in self._decisions else self._elapsed()
            self._decisions[key] = (since, dict(event))
            while len(self._decisions) > _NUM_SHOWN:
                del self._decisions[next(iter(self._decisions))]
        elif kind == "resize":
            self._resizes.append((self._elapsed(), _resize_line(event).removeprefix("resize: ")))
        else:
            line = describe(event)
            if line is not None:
                return Text(f"[{self._elapsed():>5}] {line}", style=_LINE_STYLES.get(str(kind), ""))
        return None

    def render(self) -> RenderableType:
        """The panel as it is now."""
        with self._lock:
            parts: list[RenderableType] = [self._phase_row()]
            if self._progress:
                parts += [self._bar_row(), self._numbers()]
            if self._decisions:
                parts.append(self._decision_table())
            if self._resizes:
                parts.append(self._resize_table())
            title = Text(f" {self._name} · {self._elapsed()} ", style="bold")
            return Panel(Group(*parts), title=title, title_align="left", border_style="cyan", padding=(0, 1))

    def _phase_row(self) -> RenderableType:
        text = Text(self._phase, overflow="ellipsis", no_wrap=True)
        if self._spinner is None:
            return text
        row = Table.grid(padding=(0, 1))
        row.add_row(self._spinner, text)
        return row

    def _bar_row(self) -> RenderableType:
        step, max_steps = self._progress.get("step") or 0, self._progress.get("max_steps")
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        left = Text(_progress_parts(self._progress).get("left", ""), style="bold")
        bar = ProgressBar(total=max_steps, completed=step) if max_steps else Text("")
        row.add_row(Text(_step_text(self._progress), style="bold"), bar, left)
        return row

    def _numbers(self) -> RenderableType:
        parts = _progress_parts(self._progress)
        table = Table.grid(padding=(0, 3))
        names = {
            "loss": "loss",
            "speed": "throughput",
            "power": "power",
            "efficiency": "energy",
            "workers": "workers",
            "energy": "so far",
        }
        shown = [(head, parts[name]) for name, head in names.items() if name in parts]
        for _ in shown:
            table.add_column()
        table.add_row(*(Text(head, style="dim") for head, _ in shown))
        table.add_row(*(Text(value, style="bold") for _, value in shown))
        return table

    def _decision_table(self) -> RenderableType:
        table = Table.grid(padding=(0, 1), expand=True)
        for _ in range(3):
            table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        table.add_row(Text("decisions", style="dim"))
        for since, event in self._decisions.values():
            outcome = str(event.get("outcome") or "pending")
            before, after = event.get("setpoint_before"), event.get("setpoint_after")
            change = f"{describe_setpoint(before)} → {describe_setpoint(after)}" if before != after else ""
            action = str(event.get("action", "")).replace("_", " ")
            reason = _verdict(event) or str(event.get("reason") or "")
            text = Text(f"{change}  " if change else "")
            text.append(reason, style="dim")
            style = _OUTCOME_STYLES.get(outcome, "")
            table.add_row(since, Text(action, style="bold"), Text(outcome, style=style), text)
        return table

    def _resize_table(self) -> RenderableType:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        table.add_row(Text("resizes", style="dim"))
        for since, text in self._resizes:
            table.add_row(since, Text(text))
        return table
