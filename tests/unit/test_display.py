"""The displays, without a terminal: rich writes to memory, the clock is a fake."""

import io
import re
import threading
from typing import Any

import pytest
from rich.console import Console

from eadt.display import LiveDisplay, PlainDisplay, describe, make_display
from eadt.record.rows import (
    AnyRow,
    ChangeRow,
    CheckpointRow,
    FaultRow,
    NoteRow,
    ValidationRow,
    as_event,
)
from eadt.testing.clock import FakeClock
from eadt.units import Quantity
from tests.unit.status_factory import TWO, make_status

ONE = {"num_workers": 1, "workers_per_gpu": 2, "mps_active_thread_percentage": 40}
PROGRESS: dict[str, Any] = {"type": "progress", "status": make_status()}
DECISION: dict[str, Any] = {
    "type": "decision",
    "decision_id": "d1",
    "action": "scale_replicas",
    "reason": "Power is 31 W a device, above 30 W.",
    "setpoint_before": TWO,
    "setpoint_after": ONE,
    "expected": {"summary": "less power."},
    "measured": None,
    "outcome": "pending",
}


def plain(interval_s: float = 10.0) -> tuple[PlainDisplay, io.StringIO, FakeClock]:
    file, clock = io.StringIO(), FakeClock()
    console = Console(file=file, width=60, force_terminal=False)
    return PlainDisplay(console, interval_s=interval_s, clock=clock), file, clock


def live(width: int = 100) -> tuple[LiveDisplay, io.StringIO, FakeClock]:
    file, clock = io.StringIO(), FakeClock()
    console = Console(file=file, width=width, height=40, force_terminal=True, color_system=None)
    return LiveDisplay(console, "demo", clock=clock), file, clock


def progress(**changes: Any) -> dict[str, Any]:
    return {"type": "progress", "status": make_status(**changes)}


def picture(display: LiveDisplay, width: int = 100) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(display.render())
    return file.getvalue()


def test_progress_names_every_quantity_with_its_unit_and_quality() -> None:
    assert describe(PROGRESS) == (
        "step 120/600, loss 2.4131, 18.2 samples/s, 31.3 W (estimated), 1.71 J/sample, 2 workers at 50 %, "
        "3.41 kJ used, 1 min 24 s and 2.30 kJ to go"
    )


def test_unknown_power_is_said_and_never_zero() -> None:
    text = describe(progress(power_w=None, joules_per_sample=None))
    assert text is not None
    assert "power not measured" in text
    assert "W (" not in text
    assert "J/sample" not in text


def test_a_figure_of_which_parts_are_unknown_is_a_bound_in_the_progress_too() -> None:
    bound = {
        "energy_j": Quantity(3410.0, 1.0, at_least=True),
        "joules_per_sample": Quantity(1.713, 0.1, at_least=True),
        "energy_to_go_j": Quantity(2300.0, None, at_least=True),
    }
    text = str(describe(progress(**bound)))
    assert "≥ 1.71 J/sample" in text
    assert "≥ 3.41 kJ used" in text
    assert "1 min 24 s and ≥ 2.30 kJ to go" in text


def test_progress_with_nothing_known_yet_is_still_a_line() -> None:
    nothing = dict.fromkeys(
        ("loss", "samples_per_second", "power_w", "joules_per_sample", "setpoint", "energy_j",
         "seconds_to_go", "energy_to_go_j", "max_steps")
    )  # fmt: skip
    assert describe(progress(step=0, **nothing)) == "step 0, power not measured"


def test_a_decision_says_what_why_and_what_is_expected() -> None:
    assert describe(DECISION) == (
        "decision d1: scale replicas 2 workers at 50 % → 1 worker at 40 %: "
        "Power is 31 W a device, above 30 W. Expected: less power."
    )


def test_the_outcome_of_a_decision_says_what_was_measured() -> None:
    row = {**DECISION, "outcome": "reverted", "measured": {"verdict": "Taken back: throughput fell."}}
    assert describe(row) == "decision d1 (scale replicas): Taken back: throughput fell."


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            ChangeRow(
                kind="in_place", from_workers=2, to_workers=1, seconds=0.4234, lost_steps=0,
                setpoint_before=TWO, setpoint_after=ONE,
            ),
            "change: workers 2 → 1, share 50 % → 40 % in place, pause 0.42 s, no step lost",
        ),
        (
            ChangeRow(kind="restart", from_workers=1, to_workers=2, lost_steps=1),
            "change: workers 1 → 2 by a restart, 1 step lost",
        ),
        (
            ChangeRow(
                kind="group", recovery=True, from_workers=2, to_workers=2, seconds=3.1, lost_steps=4,
                setpoint_before=TWO, setpoint_after=TWO,
            ),
            "recovery: same setting, new engines by a new worker group, pause 3.10 s, 4 steps lost",
        ),
        (ValidationRow(step=20, loss=3.25), "validation loss 3.2500 at step 20"),
        (
            CheckpointRow(kind="just_in_time", step=9, seconds=0.5, num_bytes=2048),
            "just-in-time checkpoint at step 9: 2.00 KiB in 0.50 s",
        ),
        (
            FaultRow(kind="engine_died", node="0123456789abcdef", detail="signal 9"),
            "fault: engine_died on node 0123456789ab: signal 9",
        ),
        (NoteRow(code="EADT-410", text="no MPS here"), "note EADT-410: no MPS here"),
    ],
)  # fmt: skip
def test_each_kind_of_row_as_one_line(row: AnyRow, text: str) -> None:
    assert describe(as_event(row)) == text


def test_a_phase_is_its_text() -> None:
    assert (
        describe({"type": "phase", "text": "starting Ray (local, 2 CPUs)"}) == "starting Ray (local, 2 CPUs)"
    )


def test_an_unknown_event_is_left_out() -> None:
    assert describe({"type": "from_the_future"}) is None


def test_plain_progress_is_throttled_but_the_last_step_is_always_shown() -> None:
    display, file, clock = plain(interval_s=10.0)
    with display:
        for step in range(1, 101):
            display.handle(progress(step=step, max_steps=100))
            clock.advance(0.5)
        display.handle(progress(step=100, max_steps=100))
    steps = [line.split(",")[0] for line in file.getvalue().splitlines()]
    assert steps == [
        "[ 0:00] step 1/100",
        "[ 0:10] step 21/100",
        "[ 0:20] step 41/100",
        "[ 0:30] step 61/100",
        "[ 0:40] step 81/100",
        "[ 0:49] step 100/100",
    ]


def test_plain_lines_are_neither_wrapped_nor_read_as_markup() -> None:
    display, file, _ = plain()
    text = "[red]a very long sentence[/red]" * 10
    display.handle({"type": "note", "code": "EADT-1", "text": text})
    assert file.getvalue().rstrip("\n") == f"[ 0:00] note EADT-1: {text}"
    assert "\x1b" not in file.getvalue()


def test_plain_repeats_no_phase() -> None:
    display, file, _ = plain()
    for _ in range(3):
        display.handle({"type": "phase", "text": "training"})
    assert file.getvalue().count("training") == 1


def test_a_broken_event_never_stops_training(caplog: pytest.LogCaptureFixture) -> None:
    display, _, _ = plain()
    display.handle({"type": "change", "seconds": 1.0, "setpoint_before": TWO, "setpoint_after": 3})
    display.handle({"type": "progress"})
    display.handle({"type": "validation", "loss": "not a number", "step": 1})
    assert "could not be shown" in caplog.text


def test_live_shows_the_state_the_decisions_and_the_changes() -> None:
    display, _, clock = live()
    with display:
        display.handle({"type": "phase", "text": "training, generation 3"})
        display.handle(PROGRESS)
        clock.advance(61)
        display.handle(DECISION)
        display.handle(as_event(ChangeRow(kind="in_place", from_workers=2, to_workers=1, seconds=0.3)))
        shown = picture(display)
    for part in ("demo · 1:01", "training, generation 3", "step 120/600", "2.4131", "31.3 W (estimated)",
                 "18.2 samples/s", "1 min 24 s and 2.30 kJ to go", "scale replicas", "pending",
                 "2 workers at 50 % → 1 worker at 40 %", "workers 2 → 1 in place, pause 0.30 s"):  # fmt: skip
        assert part in shown


@pytest.mark.parametrize("width", [46, 60, 80])
def test_on_a_narrow_terminal_no_number_is_torn_from_its_unit(width: int) -> None:
    display, _, _ = live()
    with display:
        display.handle({"type": "phase", "text": "training"})
        display.handle(PROGRESS)
        display.handle(
            {**DECISION, "reason": "Power is 31 W a device, above 30 W; 12 samples/s at 4.5 kJ. " * 3}
        )
        display.handle(
            as_event(ChangeRow(kind="group", from_workers=2, to_workers=1, seconds=3.3, lost_steps=2,
                               setpoint_before=TWO, setpoint_after=ONE))
        )  # fmt: skip
        shown = picture(display, width)
    lines = [line.strip("│ ") for line in shown.splitlines()]
    assert all(len(line) <= width for line in shown.splitlines())
    for line in lines:  # a unit never begins a line, and no line ends with a bare number
        assert not re.match(r"(W|kJ|J|%|s|min|samples/s|J/sample)\b", line), shown
        assert not re.search(r"\b\d+([.,]\d+)?$", line) or "120/600" in line, shown
    for part in (
        "2.4131",
        "18.2 samples/s",
        "31.3 W (estimated)",
        "1.71 J/sample",
        "3.41 kJ used",
        "kJ to go",
    ):
        assert part in shown


def test_live_updates_a_decision_in_its_place_and_keeps_the_last_four() -> None:
    display, _, _ = live()
    for number in range(6):
        display.handle({**DECISION, "decision_id": f"d{number}", "action": f"action{number}"})
    display.handle({**DECISION, "decision_id": "d5", "action": "action5", "outcome": "kept"})
    shown = picture(display)
    assert "action1" not in shown
    assert shown.count("action5") == 1
    assert shown.count("kept") == 1
    assert shown.count("pending") == 3


def test_live_prints_what_should_stay_above_the_panel() -> None:
    display, file, _ = live()
    with display:
        display.handle({"type": "fault", "kind": "engine_died", "detail": "signal 9"})
        display.handle({"type": "note", "code": "EADT-410", "text": "no MPS here"})
    assert "fault: engine_died: signal 9" in file.getvalue()
    assert "note EADT-410: no MPS here" in file.getvalue()


def test_live_takes_events_from_several_threads_while_it_draws() -> None:
    display, _, _ = live()
    with display:
        threads = [
            threading.Thread(
                target=lambda: [display.handle({"type": "note", "code": "N", "text": "x"}) for _ in range(50)]
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for _ in range(20):
            assert display._live is not None
            display._live.refresh()
        for thread in threads:
            thread.join(timeout=20)
        assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(
    ("terminal", "plain", "expected"),
    [(True, False, LiveDisplay), (True, True, PlainDisplay), (False, False, PlainDisplay)],
)
def test_the_live_display_needs_a_terminal(terminal: bool, plain: bool, expected: type) -> None:
    environment = {"TERM": "xterm"}
    console = Console(file=io.StringIO(), force_terminal=terminal, _environ=environment)
    assert type(make_display(console, "demo", plain=plain)) is expected


def test_power_is_no_longer_a_question_when_the_run_is_over() -> None:
    ended = progress(status="completed", power_w=None)
    assert "not measured" not in (describe(ended) or "")
    going_on = progress(status="training", power_w=None)
    assert "power not measured" in (describe(going_on) or "")
