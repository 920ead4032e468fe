"""The report as a document: its fields, its three forms, and runs that did not end well."""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eadt.clock import Clock
from eadt.errors import ConfigError, EnvironmentFailure
from eadt.record.figures import Binned
from eadt.record.ledger import open_books
from eadt.record.rows import (
    USES,
    DecisionRow,
    EnergyRow,
    LedgerRow,
    NodeRow,
    NoteRow,
    SessionRow,
    StepsRow,
    ValidationRow,
    encode,
)
from eadt.report import (
    Report,
    build_report,
    render_html,
    render_json,
    render_markdown,
    report_json_schema,
    words,
    write_report,
)
from eadt.report.svg import ticks
from eadt.report.words import cell, difference, moment, number, pairs, percentage, throttling
from eadt.testing.clock import FakeClock
from eadt.units import Quantity
from tests.unit.ledger_factory import NODE, OTHER, START_UNIX_S, Rows, setpoint, synthetic_run, training
from tests.unit.status_factory import TWO

ROOT = Path(__file__).parents[2]
LONG_AFTER = FakeClock(unix_s=START_UNIX_S + 86_400)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return build_report(synthetic_run().write(tmp_path_factory.mktemp("synthetic")))


def values_of(split: Mapping[str, Quantity | None]) -> dict[str, float]:
    return {name: part.value for name, part in split.items() if part is not None}


def text_of(report: Report) -> str:
    return " ".join(" ".join(_parse(render_html(report)).text).split())


# -- the document -------------------------------------------------------------------------------------------


def test_the_schema_in_the_documentation_is_current() -> None:
    stored = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    assert stored == report_json_schema(), "run: python -m eadt.report > docs/report.schema.json"


def test_the_json_form_fits_the_schema_and_comes_back_equal(report: Report) -> None:
    text = render_json(report)
    jsonschema.validate(json.loads(text), report_json_schema())
    assert Report.model_validate_json(text) == report


def test_the_fields_that_others_rely_on(report: Report) -> None:
    document = json.loads(render_json(report))
    assert document["schema_version"] == 2
    assert {"id", "status", "num_params", "versions"} <= document["run"].keys()
    assert document["run"]["num_params"] == 12_345_678
    energy = document["energy_j"]
    assert set(energy["total"]) == {"value", "uncertainty", "at_least", "qualities"}
    assert tuple(energy["by_use"]) == USES
    assert {"startup", "change"} <= energy["by_use"].keys()
    assert {"by_component", "by_quality", "by_node", "shared_out", "foreign", "not_measured"} <= energy.keys()
    assert document["loss"]["validation_first"] == 5.61
    assert document["loss"]["validation_last"] == 1.52
    changes = [item for item in document["changes"] if not item["recovery"]]
    assert len(changes) == 4
    first = changes[0]
    assert (first["from_workers"], first["to_workers"], first["kind"]) == (4, 2, "in_place")
    assert (first["seconds"], first["lost_steps"]) == (0.4, 0)
    (recovery,) = (item for item in document["changes"] if item["recovery"])
    assert (recovery["kind"], recovery["lost_steps"]) == ("group", 4)
    assert [decision["outcome"] for decision in document["decisions"]] == ["kept", "reverted", "kept", "kept"]
    assert document["decisions"][0]["measured"]["power_w"] == 336.0
    assert document["decisions"][0]["action"] == "increase"  # from the row before the one with the outcome
    assert document["optimizer_steps"] * 16 == document["samples"]
    assert document["lost_steps"] == 4


def test_every_split_sums_to_the_total_to_the_last_digit(report: Report) -> None:
    energy = json.loads(render_json(report), parse_float=Decimal, parse_int=Decimal)["energy_j"]
    total = energy["total"]["value"]
    assert total > 100_000
    for split in ("by_use", "by_component", "by_quality", "by_node"):
        parts = [part["value"] for part in energy[split].values()]
        assert len(parts) >= 2
        assert sum(parts) == total, split


def test_the_reports_figures_are_those_of_the_books(tmp_path: Path) -> None:
    folder = synthetic_run().write(tmp_path)
    books = open_books(folder / "ledger").books
    report = build_report(folder)
    assert report.energy_j.total == books.energy()
    assert report.joules_per_sample == books.joules_per_sample()
    assert report.joules_per_token == books.joules_per_token()
    assert report.mean_power_w == books.mean_power_w()
    assert report.energy_j.shared_out["input"] == books.shared_out_j["input"] > 0
    assert report.energy_j.foreign == books.foreign_j
    assert set(report.energy_j.foreign) == {"gpu0"}


def test_a_bound_of_the_total_is_one_of_its_quotients(report: Report) -> None:
    assert report.energy_j.not_measured.num_gaps == 1
    for figure in (report.energy_j.total, report.joules_per_sample, report.joules_per_token):
        assert figure is not None
        assert figure.at_least
        assert figure.uncertainty
    # What was not touched by the gap is no bound.
    assert report.energy_j.by_component["cpu"].at_least is False
    assert report.energy_j.by_component["gpu0"].at_least is True


def test_the_digest_and_all_of_the_ledger_give_the_same_report(tmp_path: Path) -> None:
    folder = synthetic_run().write(tmp_path)
    assert (folder / "ledger" / "digest.json").exists()
    assert build_report(folder, LONG_AFTER) == build_report(folder, LONG_AFTER, from_ledger=True)


def test_what_each_setting_brought(report: Report) -> None:
    settings = [part for part in report.settings if part.number > 0]
    assert [part.setpoint for part in settings] == [
        setpoint(4, 50), setpoint(2, 50), setpoint(2, 80), setpoint(4, 80), setpoint(4, 70)
    ]  # fmt: skip
    for part in settings:
        assert part.energy_j is not None
        assert part.samples == 16 * part.num_steps
        assert part.joules_per_sample == pytest.approx(part.energy_j / part.samples)
    assert sum(part.num_steps for part in settings) == report.optimizer_steps


def test_one_value_of_the_validation_is_one_value(tmp_path: Path) -> None:
    rows = training()
    rows.add(ValidationRow(step=10, loss=7.61, generation=1, at_s=15.0))
    rows.end(16.0)
    report = build_report(rows.write(tmp_path))
    assert (report.loss.validation_first, report.loss.validation_last) == (None, 7.61)
    for text in (text_of(report), render_markdown(report)):
        assert "7.61" in text
        assert "7.61 →" not in text


def test_a_step_alone_has_one_loss(tmp_path: Path) -> None:
    report = build_report(training(1).write(tmp_path), LONG_AFTER)
    assert (report.loss.first, report.loss.last) == (None, 4.0)
    assert "4 →" not in text_of(report)


def test_a_loss_that_is_not_finite_is_unknown(tmp_path: Path) -> None:
    rows = training(0)
    rows.steps(1, [5.0, 6.0], [1.0, 1.0], loss=[2.0, math.nan])
    report = build_report(rows.write(tmp_path), LONG_AFTER)
    assert (report.loss.first, report.loss.last) == (2.0, None)
    assert _parse(render_html(report)).tags >= {"svg"}


# -- the page -----------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Collects what could reach outside the page, and whether tags are balanced."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _parse(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def test_the_page_needs_nothing_from_outside(report: Report) -> None:
    html = render_html(report)
    page = _parse(html)
    assert page.links == []
    assert not page.tags & {"script", "link", "iframe", "img", "b-synthetic"}
    assert "@import" not in html
    assert not re.search(r"url\(", html)
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "nan" not in re.findall(r'd="([^"]*)"', html)
    assert not re.search(r'="[^"]*\b(nan|inf)\b[^"]*"', html)


def test_the_page_shows_the_figures_with_unit_quality_and_uncertainty(report: Report) -> None:
    text = text_of(report)
    assert re.search(r"energy at least \d+\.\d ± \d+\.\d kJ estimated \+ simulated", text)
    assert re.search(r"energy per sample at least \d+\.\d+ ± \d+\.\d+ J ", text)
    for expected in (
        "Power, W (estimated + simulated)",
        "workers 4 → 2",
        "share 50 % → 80 %",
        "power 336 W, 10.67 samples/s",
        "reverted",
        "5.61 → 1.52",
        "SYNTHETIC ledger",
        "Not measured: 6.00 s of component time",
        "by a model",
        "Other programs ran on cards of this run too: gpu0",
        "Shared machines:",
        f"gpu0 on {NODE} was slowed 62 % of the time: heat",
        "61.00 GiB of 80.00 GiB",
        "rapl: /sys/class/powercap may not be read",
        "± 30 %",
        "same setting, new engines",
        "the card did not answer",
        "<b>synthetic</b>",  # the reason's own markup is shown, not obeyed
    ):
        assert expected in text


def test_every_use_is_in_the_table_and_what_was_shared_out_is_marked(report: Report) -> None:
    text = text_of(report)
    for use in USES:
        assert re.search(rf"\b{use}\b", text)
    html = render_html(report)
    (row,) = re.findall(r"<tr><td><span class=\"key u-input\">.*?</tr>", html, flags=re.DOTALL)
    assert "of it shared out" in row
    (row,) = re.findall(r"<tr><td><span class=\"key u-startup\">.*?</tr>", html, flags=re.DOTALL)
    assert "shared out" not in row


def test_each_band_of_the_plot_is_in_its_legend(report: Report) -> None:
    html = render_html(report)
    drawn = {use for _, _, use in report.series.uses}
    assert {"startup", "useful", "validation", "change", "checkpoint", "idle", "lost"} <= drawn
    (legend,) = re.findall(r'<div class="legend-row">(.*?)</div>', html, flags=re.DOTALL)
    assert set(re.findall(r'class="key u-(\w+)"', legend)) == drawn
    for use in drawn:
        assert f".fill.u-{use} {{ fill: var(--{use}); }}" in html
        assert f"--{use}:" in html


def test_decisions_changes_and_recoveries_are_marked_in_the_plot(report: Report) -> None:
    html = render_html(report)
    assert html.count('class="mark decision"') == 4
    assert html.count('class="mark change"') == 4
    assert html.count('class="mark recovery"') == 1
    assert re.search(r"D2 increase at 1 min \d\d s: share 50 % → 80 % \(reverted\)", html)


def test_holds_are_listed_but_not_marked(tmp_path: Path) -> None:
    rows = training()
    same: dict[str, Any] = {"num_workers": 2}
    rows.add(
        DecisionRow(
            decision_id="h", at_s=5.0, action="maintain", reason="all is well", outcome="held",
            setpoint_before=same, setpoint_after=same, repeats=7,
        )
    )  # fmt: skip
    report = build_report(rows.write(tmp_path), LONG_AFTER)
    html = render_html(report)
    assert 'class="mark decision"' not in html
    assert "all is well" in html
    assert "(7 times)" in html
    assert "1 further decision left the setpoint as it was" in render_markdown(report)


def test_the_plotted_power_integrates_to_the_energy(report: Report) -> None:
    power = report.series.power_w
    cpu_j = math.fsum(value * power.bin_s for value in power.values["cpu"] if value is not None)
    assert cpu_j == pytest.approx(report.energy_j.by_component["cpu"].value, rel=0.02)


def test_what_was_not_measured_is_shaded_in_the_plot(report: Report) -> None:
    html = render_html(report)
    assert html.count('class="gap"') == 1
    assert f"gpu0 on {OTHER}: the card did not answer" in html


def test_what_was_not_measured_is_a_hole_in_the_line(tmp_path: Path) -> None:
    rows = training(10)
    rows.energy(15.0, 25.0, None, use="idle", why_unknown={"cpu": "nothing answered"})
    rows.energy(25.0, 35.0, 300.0, use="idle")
    report = build_report(rows.write(tmp_path), LONG_AFTER)
    power = report.series.power_w
    in_gap = [place for place in range(len(power.values["cpu"])) if 16 < (place + 0.5) * power.bin_s < 24]
    assert in_gap
    assert all(power.values["cpu"][place] is None for place in in_gap)
    (line,) = re.findall(r'class="line c-1" d="([^"]*)"', render_html(report).split("Throughput")[0])
    assert line.count("M") == 2


def test_many_cards_share_an_entry_of_the_legend_and_the_worst_are_said(report: Report) -> None:
    power = report.series.power_w
    cards = {f"gpu{number}": power.values["gpu0"] for number in range(8)}
    values = {"cpu": power.values["cpu"], **cards, "total": power.values["total"]}
    series = replace(report.series, power_w=Binned(power.bin_s, values))
    (slowed, _) = report.devices
    devices = [
        replace(slowed, component=f"gpu{number}", throttled={"heat": 0.1 + number / 100})
        for number in range(30)
    ]
    html = render_html(report.model_copy(update={"series": series, "devices": devices}))
    assert html.count("gpu0 to gpu7") == 1
    assert html.count('class="line c-2" d="M') >= 8
    sentences = re.findall(r"<li>(\S+) on \S+ was slowed", html)
    assert sentences == [f"gpu{number}" for number in range(29, 21, -1)]
    assert "so were 22 more cards" in html
    assert "<summary>30 cards</summary>" in html


def test_what_the_report_has_no_room_for_is_said(report: Report) -> None:
    counts = {**report.ledger.num_by_kind, "note": 1200, "checkpoint": 2}
    ledger = report.ledger.model_copy(update={"num_by_kind": counts})
    text = text_of(report.model_copy(update={"ledger": ledger}))
    assert "Notes: 1 199 more are in the ledger." in text
    assert "more are in the ledger" not in text_of(report)


# -- Markdown and files -------------------------------------------------------------------------------------


def test_the_markdown_tables_hold_together(report: Report) -> None:
    text = render_markdown(report)
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 9
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    assert re.search(r"\| useful \(steps that count\) \| (at least )?\d+\.?\d* ± \d+\.?\d* kJ \|", text)
    assert "<b>" not in text
    assert f"- gpu0 on {NODE} was slowed 62 % of the time: heat" in text


def test_writing_is_atomic_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = synthetic_run().write(tmp_path / "run")
    written = write_report(folder)
    assert {name: path.name for name, path in written.items()} == {
        "json": "report.json",
        "markdown": "report.md",
        "html": "report.html",
    }
    assert {path.name for path in folder.iterdir()} == {"ledger", "report.json", "report.md", "report.html"}
    before = (folder / "report.json").read_text()
    assert Report.model_validate_json(before).run.name == "synthetic"

    def fail(source: Path, target: Path) -> None:
        raise OSError(28, f"No space left for {target} from {source}")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder, formats=("json",))
    assert (folder / "report.json").read_text() == before
    assert {path.name for path in folder.iterdir()} == {"ledger", "report.json", "report.md", "report.html"}


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such report format: pdf"):
        write_report(tmp_path, formats=("pdf",))


# -- runs that did not end, or not well ---------------------------------------------------------------------


def _at(seconds: float) -> Clock:
    return FakeClock(unix_s=START_UNIX_S + seconds)


@pytest.mark.parametrize(
    ("seconds", "status", "sentence"),
    [(20.0, "running", "The run goes on"), (1000.0, "crashed", "ended without a word")],
)
def test_a_run_without_an_end_goes_on_while_it_is_heard_of(
    tmp_path: Path, seconds: float, status: str, sentence: str
) -> None:
    report = build_report(training().write(tmp_path), _at(seconds))
    assert report.partial
    assert report.run.status == status
    assert report.sessions[-1].status == status
    assert report.run.ended_unix_s is None
    assert report.partial_reason is not None
    assert sentence in report.partial_reason
    assert "last heard of at 2025-06-15 15:06:55 UTC" in report.partial_reason
    for text in (text_of(report), render_markdown(report)):
        assert report.partial_reason in text


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_was_ended_early_says_how_and_why(tmp_path: Path, status: str) -> None:
    rows = training()
    rows.end(16.0, status, "the disk was full")
    report = build_report(rows.write(tmp_path), LONG_AFTER)
    assert (report.run.status, report.run.reason, report.partial) == (status, "the disk was full", True)
    assert "the disk was full" in str(report.partial_reason)
    assert status in str(report.partial_reason)


def test_a_completed_run_is_not_partial(tmp_path: Path) -> None:
    rows = training()
    rows.end(16.0)
    report = build_report(rows.write(tmp_path), LONG_AFTER)
    assert (report.run.status, report.partial, report.partial_reason) == ("completed", False, None)
    assert report.run.ended_unix_s == START_UNIX_S + 16.0
    assert "Partial" not in render_html(report)


def crashed_and_resumed() -> Rows:
    """A session that ended without a word at 15 s, an hour of nothing, and one that went on from step 8."""
    rows = training()
    rows.session(after_s=3600.0, resumed_step=8, train_batch_size=8, max_steps=12)
    rows.node(boot_id="another boot")
    rows.energy(0.0, 4.0, 120.0, use="startup", step=8)
    rows.time(0.0, 4.0, "startup", step=8)
    rows.generation(4.0, setpoint=setpoint(1, 100), world_size=1)
    rows.energy(4.0, 8.0, 120.0, generation=1, setting=1, step=8)
    rows.steps(9, [4.0, 5.0, 6.0, 7.0], [1.0] * 4, loss=[2.0, 1.9, 1.8, 1.7])
    rows.time(4.0, 8.0, step=8, generation=1, setting=1)
    rows.end(8.0)
    return rows


def test_a_run_that_went_on_after_a_crash_is_one_report(tmp_path: Path) -> None:
    folder = crashed_and_resumed().write(tmp_path)
    report = build_report(folder, LONG_AFTER)
    assert (report.run.status, report.run.num_sessions) == ("completed", 2)
    assert report.run.wall_s == pytest.approx(23.0)
    assert (report.optimizer_steps, report.lost_steps) == (12, 2)
    assert report.energy_j.total is not None
    assert report.energy_j.total.value == 150.0 + 300.0 + 240.0
    assert [session.status for session in report.sessions] == ["no word", "completed"]
    assert (report.loss.first, report.loss.last) == (4.0, 1.7)
    text = text_of(report)
    assert "ended without a word, last heard of at 2025-06-15 15:06:55 UTC" in text
    assert "ended without a word, last heard of at" in render_markdown(report)
    assert max(to_s for _, to_s, _ in report.series.uses) <= 23.0  # the hour is not on the axis


# -- ledgers that are not whole -----------------------------------------------------------------------------


def test_a_damaged_ledger_is_reported_as_such(tmp_path: Path) -> None:
    folder = synthetic_run().write(tmp_path)
    whole = build_report(folder, from_ledger=True)
    path = folder / "ledger" / "events-1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    (place,) = (at for at, line in enumerate(lines) if b'"type":"checkpoint"' in line and b"periodic" in line)
    lines[place] = b"\x00garbage\n"
    lines.insert(place, b'{"type":"from_the_future","seq":1}\n')
    lines.insert(place, b'{"type":"energy","node":"n","t0":"now"}\n')
    path.write_bytes(b"".join(lines) + b'{"type": "ener')
    report = build_report(folder, from_ledger=True)
    assert report.ledger.corrupt == [f"events-1.jsonl:{place + 3}"]
    assert report.ledger.unknown == {"from_the_future": 1}
    assert report.ledger.num_senseless == 1
    assert report.ledger.torn == ["events-1.jsonl"]
    assert len(report.ledger.damage) == 4
    assert report.energy_j == whole.energy_j
    for text in (text_of(report), render_markdown(report)):
        assert f"events-1.jsonl:{place + 3}" in text
        assert "from_the_future (1)" in text
        assert "A part of the ledger could not be used" in text
    assert "could not be used" not in text_of(whole)


def test_rows_that_make_no_sense_are_named(tmp_path: Path) -> None:
    rows = training()
    rows.add(EnergyRow(node=NODE, t0=99.0, t1=98.0, use="useful", joules=[1.0]))
    report = build_report(rows.write(tmp_path), LONG_AFTER)
    assert report.ledger.num_unusable == 1
    assert "energy" in report.ledger.unusable[0]
    assert any("make no sense" in sentence for sentence in report.ledger.damage)


def test_a_file_of_a_newer_version_is_left_out_and_named(tmp_path: Path) -> None:
    folder = training().write(tmp_path)
    newer = folder / "ledger" / "events-2.jsonl"
    newer.write_bytes(
        encode(LedgerRow(schema_version=99)) + b"\n" + encode(NoteRow(code="X", text="y")) + b"\n"
    )
    report = build_report(folder, LONG_AFTER)
    assert report.ledger.newer == ["events-2.jsonl: version 99"]
    assert report.optimizer_steps == 10
    assert "newer version" in text_of(report)


def test_energy_of_a_use_that_is_not_known_is_in_the_total_and_in_its_parts(tmp_path: Path) -> None:
    rows = training()
    rows.energy(15.0, 20.0, 150.0, use="<tea>")
    report = build_report(rows.write(tmp_path), LONG_AFTER)
    assert report.energy_j.total is not None
    assert values_of(report.energy_j.by_use)["<tea>"] == 150.0
    assert sum(values_of(report.energy_j.by_use).values()) == report.energy_j.total.value == 600.0
    assert "<tea> not a use that this version knows" in text_of(report)


def test_a_setpoint_that_holds_words_is_shown_and_not_drawn(tmp_path: Path) -> None:
    rows = training()
    rows.generation(15.0, 2, 2, setpoint={"num_workers": "many", "mps_active_thread_percentage": 50})
    report = build_report(rows.write(tmp_path), LONG_AFTER)
    assert "many workers at 50 %" in text_of(report)


def _spoil(value: Any, dice: random.Random) -> Any:
    """The same with one value in it that makes no sense, or gone."""
    if isinstance(value, dict) and value:
        name = dice.choice(list(value))
        rest = {key: part for key, part in value.items() if key != name}
        return rest if dice.random() < 0.1 else rest | {name: _spoil(value[name], dice)}
    if isinstance(value, list) and value:
        place = dice.randrange(len(value))
        return [*value[:place], _spoil(value[place], dice), *value[place + 1 :]]
    return dice.choice([0, -1, 1e308, -1e308, 2**63, 2**70, "x", None, True, [], {}, 0.5, 1e-300, 1e15])


def test_whatever_a_ledger_says_its_report_is_made_and_adds_up(tmp_path: Path) -> None:
    lines = (
        (synthetic_run().write(tmp_path / "whole") / "ledger" / "events-1.jsonl").read_bytes().splitlines()
    )
    for seed in range(40):
        dice = random.Random(seed)
        spoilt = list(lines)
        for place in dice.sample(range(len(lines)), 8):
            spoilt[place] = json.dumps(_spoil(json.loads(lines[place]), dice)).encode()
        folder = _ledger_of(tmp_path / str(seed), b"\n".join(spoilt))
        report = build_report(folder, LONG_AFTER)
        render_html(report), render_markdown(report)
        energy = json.loads(render_json(report), parse_float=Decimal, parse_int=Decimal)["energy_j"]
        for split in ("by_use", "by_component", "by_quality", "by_node"):
            parts = sum(part["value"] for part in energy[split].values())
            assert parts == energy["total"]["value"], (seed, split)


def _ledger_of(folder: Path, content: bytes) -> Path:
    (folder / "ledger").mkdir(parents=True)
    (folder / "ledger" / "events-1.jsonl").write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("content", "error", "code", "sentence"),
    [
        (b"", ConfigError, "EADT-332", "no row that can be used yet"),
        (b'\x00\x00\x00\n{"type": "ru', ConfigError, "EADT-332", "events-1.jsonl:1"),
        (b'{"type":"step","seq":1,"unix_s":1.0,"step":1}\n', ConfigError, "EADT-332", "step (1)"),
        (b'{"type":"ledger","schema_version":99}\n', EnvironmentFailure, "EADT-334", "newer version"),
    ],
)
def test_a_ledger_of_which_nothing_can_be_read_is_an_error_that_says_why(
    tmp_path: Path, content: bytes, error: type[Exception], code: str, sentence: str
) -> None:
    with pytest.raises(error) as caught:
        build_report(_ledger_of(tmp_path, content))
    assert caught.value.code == code  # type: ignore[attr-defined]
    assert sentence in str(caught.value)


def test_a_ledger_that_may_not_be_read_is_an_error_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _ledger_of(tmp_path, encode(SessionRow(run_id="r", name="n")) + b"\n")
    opened = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:  # the tests may run as root
        if self.name.startswith("events-"):
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(EnvironmentFailure, match=r"events-1\.jsonl.*Permission denied") as caught:
        build_report(folder)
    assert (caught.value.code, caught.value.exit_status) == ("EADT-334", 3)


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError) as caught:
            build_report(folder)
        assert caught.value.code == "EADT-331"


@pytest.mark.parametrize(
    "kinds",
    [
        (SessionRow,), (NoteRow,), (SessionRow, NodeRow), (StepsRow,), (EnergyRow,), (NodeRow, EnergyRow),
        (DecisionRow,), (ValidationRow,),
    ],
)  # fmt: skip
def test_a_run_that_has_hardly_begun_renders_without_inventing_numbers(
    tmp_path: Path, kinds: tuple[type, ...]
) -> None:
    rows = synthetic_run(ended=False)
    rows.files = [[item for item in rows.files[0] if isinstance(item[1], kinds)]]
    report = build_report(rows.write(tmp_path), LONG_AFTER)
    text = render_markdown(report) + text_of(report)
    jsonschema.validate(json.loads(render_json(report)), report_json_schema())
    if kinds != (NodeRow, EnergyRow):
        assert report.energy_j.total is None
        assert set(report.energy_j.by_use.values()) == {None}
        assert report.joules_per_sample is None
        assert "not measured" in text
        assert " 0 J" not in text


# -- words --------------------------------------------------------------------------------------------------


def test_counts_have_whole_ticks() -> None:
    assert ticks(0.0, 4.3, 2, whole=True) == [0.0, 2.0, 4.0]
    assert ticks(0.0, 2.2, 3, whole=True) == [0.0, 1.0, 2.0]
    assert ticks(0.0, 1.1, 2, whole=True) == [0.0, 1.0]


def test_words() -> None:
    assert difference({"num_workers": 4, "precision": "fp32"}, {"num_workers": 2, "precision": "bf16"}) == (
        "workers 4 → 2, precision fp32 → bf16"
    )
    assert difference({"power_limit_w": None}, {"power_limit_w": 250.0}) == "power limit unset → 250 W"
    assert difference({"num_workers": 2}, {"num_workers": 2}) == "no change"
    assert pairs({"power_w": 420.04, "samples_per_second": 10.5, "x": None}) == "power 420 W, 10.5 samples/s"
    assert number(None, "W") == "not measured"
    assert cell("a|b\n<i>\\") == "a\\|b &lt;i>\\\\"


def test_what_makes_no_sense_is_said_without_raising() -> None:
    assert [moment(at) for at in (0.0, 1e15, -1e18, 1e30)] == ["1970-01-01 00:00:00 UTC"] + 3 * [
        "an impossible time"
    ]
    odd = {
        "num_workers": "x",
        "mps_active_thread_percentage": [],
        "power_limit_w": {},
        "num_frozen_layers": "y",
    }
    assert words.setpoint(odd) == "x workers at [] %, {} W limit, y frozen layers"
    assert words.setpoint({**TWO, "power_limit_w": 250.0}) == "2 workers at 50 %, 250 W limit"


def test_a_fraction_is_all_or_nothing_only_where_it_is() -> None:
    assert [percentage(part) for part in (0.0, 0.004, 0.62, 0.999, 1.0)] == [
        "0 %",
        "< 1 %",
        "62 %",
        "> 99 %",
        "100 %",
    ]


def test_why_a_card_was_slowed_is_said_in_words() -> None:
    assert throttling("gpu0", {"heat": 0.62}) == "gpu0 was slowed 62 % of the time: heat"
    assert throttling("gpu1", {"heat": 0.1, "power_cap": 0.4}) == (
        "gpu1 was slowed 40 % of the time: the power limit; 10 % of the time: heat"
    )
    assert throttling("gpu0", {"other": 0.001}) == ""
    assert throttling("gpu0", {}) == ""


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e9), num=st.integers(2, 12))
def test_ticks_are_few_ordered_and_inside(low: float, span: float, num: int) -> None:
    found = ticks(low, low + span, num)
    assert len(found) <= num + 2
    assert found == sorted(found)
    slack = 1e-6 * (span + abs(low))
    assert all(low - slack <= tick <= low + span + slack for tick in found)
