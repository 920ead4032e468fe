"""The report as a document: its fields, its three forms, and runs that did not end well."""

from __future__ import annotations

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eadt.errors import ConfigError
from eadt.report import (
    Report,
    build_report,
    render_html,
    render_json,
    render_markdown,
    report_json_schema,
    write_report,
)
from eadt.report.render import cell, change, number, pairs
from eadt.report.series import MAX_POINTS
from eadt.report.svg import ticks
from eadt.testing.clock import FakeClock
from tests.unit.ledger_factory import NODE, START_UNIX_S, Rows, synthetic_run, write_run
from tests.unit.test_accounting import resumed_rows

ROOT = Path(__file__).parents[2]
LONG_AFTER = FakeClock(unix_s=START_UNIX_S + 86_400)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return build_report(write_run(tmp_path_factory.mktemp("synthetic"), synthetic_run()))


def test_the_schema_in_the_documentation_is_current() -> None:
    stored = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    assert stored == report_json_schema(), "run: python -m eadt.report > docs/report.schema.json"


def test_the_json_form_fits_the_schema_and_comes_back_equal(report: Report) -> None:
    text = render_json(report)
    jsonschema.validate(json.loads(text), report_json_schema())
    assert Report.model_validate_json(text) == report


def test_the_fields_that_others_rely_on(report: Report) -> None:
    document = json.loads(render_json(report))
    assert {"id", "status", "num_params", "versions"} <= document["run"].keys()
    assert document["run"]["num_params"] == 12_345_678
    assert set(document["energy_j"]["by_use"]) == {"useful", "restart", "checkpoint", "idle", "lost"}
    assert {"total", "by_use", "by_component", "by_quality"} <= document["energy_j"].keys()
    assert set(document["loss"]) == {"first", "last", "validation_first", "validation_last"}
    assert (document["loss"]["validation_first"], document["loss"]["validation_last"]) == (5.61, 1.52)
    assert len(document["resizes"]) == 4
    first = document["resizes"][0]
    assert (first["at_s"], first["from_workers"], first["to_workers"], first["kind"]) == (
        60.0,
        4,
        2,
        "in_place",
    )
    assert (first["seconds"], first["lost_steps"]) == (0.4, 0)
    assert [decision["outcome"] for decision in document["decisions"]] == ["kept", "reverted", "kept", "kept"]
    assert document["decisions"][0]["measured"]["power_w"] == 336.0
    assert document["optimizer_steps"] * 16 == document["samples"]


def test_every_split_sums_to_the_total(report: Report) -> None:
    energy = report.energy_j
    assert energy.total is not None
    assert math.fsum(value or 0.0 for value in energy.by_use.values()) == pytest.approx(
        energy.total, rel=1e-12
    )
    for split in (energy.by_component, energy.by_quality, energy.by_node):
        assert math.fsum(split.values()) == pytest.approx(energy.total, rel=1e-12)
    assert report.joules_per_sample == pytest.approx(energy.total / (report.samples or 0))
    assert math.fsum(report.seconds_by_use.values()) == pytest.approx(report.run.wall_s, abs=1.0)


def test_the_plotted_power_integrates_to_the_energy(report: Report) -> None:
    power = report.series.power_w
    cpu_j = math.fsum(value * power.bin_s for value in power.values["cpu"] if value is not None)
    assert cpu_j == pytest.approx(report.energy_j.by_component["cpu"], rel=0.01)


def test_what_a_node_did_not_measure_is_not_inferred_from_another(report: Report) -> None:
    power = report.series.power_w
    in_gap = [place for place, at_s in enumerate(power.at_s) if 84.5 < at_s < 89.5]
    assert in_gap
    assert all(power.values["gpu0"][place] is None for place in in_gap)
    assert all(power.values["total"][place] is None for place in in_gap)
    assert all(power.values["cpu"][place] is not None for place in in_gap)
    assert [(gap.component, gap.seconds) for gap in report.energy_j.not_measured.longest_gaps] == [
        ("gpu0", 6.0)
    ]


def test_series_are_downsampled(tmp_path: Path) -> None:
    rows = Rows()
    rows.run()
    rows.node()
    rows.phase(0.0, "train")
    for step in range(1, 3001):
        rows.step(step, step - 1.0, float(step), loss=1.0)
        rows.energy(step - 1.0, float(step), 10.0)
    series = build_report(write_run(tmp_path, rows.rows), LONG_AFTER).series
    assert len(series.loss.step) == MAX_POINTS
    assert (series.loss.step[0], series.loss.step[-1]) == (1, 3000)
    assert len(series.power_w.at_s) <= MAX_POINTS
    assert {value for value in series.power_w.values["total"]} == {10.0}
    assert series.throughput_samples_per_s.values["total"] == [8.0] * len(series.power_w.at_s)
    assert series.efficiency_samples_per_j.values["total"] == [0.8] * len(
        series.efficiency_samples_per_j.at_s
    )


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


def test_the_page_shows_the_numbers_with_unit_and_quality(report: Report) -> None:
    text = " ".join(" ".join(_parse(render_html(report)).text).split())
    for expected in (
        "at least 112.88 kJ",
        "estimated + simulated",
        "Power, W (estimated + simulated)",
        "workers 4 → 2",
        "share 50 % → 80 %",
        "power 336 W, 10.67 samples/s",
        "reverted",
        "5.61 → 1.52",
        "SYNTHETIC ledger",
        "Not measured: 6 s of component time",
        "<b>synthetic</b>",  # the reason's own markup is shown, not obeyed
    ):
        assert expected in text


def test_decisions_and_resizes_are_marked_in_the_plot(report: Report) -> None:
    html = render_html(report)
    assert html.count('class="mark decision"') == 4
    assert html.count('class="mark resize"') == 4
    assert "D2 increase at 1 min 50 s: share 50 % → 80 % (reverted)" in html


def test_the_markdown_tables_hold_together(report: Report) -> None:
    text = render_markdown(report)
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 6
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    assert "| useful (steps that count) | 103" in text
    assert "<b>" not in text


def test_writing_is_atomic_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", synthetic_run())
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
    assert not list(folder.glob(".*"))
    with pytest.raises(ValueError, match="no such report format: pdf"):
        write_report(folder, formats=("pdf",))


@pytest.mark.parametrize("make", ["nothing", "folder", "empty ledger", "damaged ledger"])
def test_no_run_to_report_on_is_the_user_s_error(tmp_path: Path, make: str) -> None:
    folder = tmp_path / "runs" / "x"
    if make == "folder":
        folder.mkdir(parents=True)
    elif "ledger" in make:
        (folder / "ledger").mkdir(parents=True)
        (folder / "ledger" / "events-1.jsonl").write_text("{oops\n" if make == "damaged ledger" else "")
    with pytest.raises(ConfigError) as caught:
        build_report(folder)
    assert caught.value.exit_status == 2
    assert caught.value.fix
    assert caught.value.means
    assert str(folder) in caught.value.what
    if make == "damaged ledger":
        assert "1 lines are damaged" in caught.value.what


def test_a_running_run_gives_a_partial_report_that_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path, synthetic_run(ended=False))
    report = build_report(folder, FakeClock(unix_s=START_UNIX_S + 235))
    assert (report.partial, report.run.status, report.run.ended_unix_s) == (True, "running", None)
    assert "Partial report" in render_html(report)
    assert "Partial report (running)" in render_markdown(report)


def test_a_run_from_which_nothing_comes_any_more_has_crashed(tmp_path: Path) -> None:
    report = build_report(write_run(tmp_path, synthetic_run(ended=False)), LONG_AFTER)
    assert report.run.status == "crashed"
    assert "23 h 56 min old" in (report.partial_reason or "")


def test_a_completed_run_is_not_partial(report: Report) -> None:
    assert not report.partial
    assert report.run.status == "completed"
    assert "Partial" not in render_html(report)


def test_a_resumed_run_is_one_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path, resumed_rows(reboot=True, with_rollback=True))
    assert len(list((folder / "ledger").iterdir())) == 2
    report = build_report(folder)
    assert (report.run.num_sessions, report.run.wall_s, report.run.status) == (2, 7.0, "completed")
    assert (report.optimizer_steps, report.lost_steps, report.energy_j.total) == (4, 1, 70.0)
    assert (report.loss.first, report.loss.last) == (4.0, 1.0)
    assert max(report.series.power_w.at_s) < 7.0  # the 100 s between the sessions are not on the axis


def test_a_damaged_ledger_is_reported_as_such(tmp_path: Path) -> None:
    folder = write_run(tmp_path, synthetic_run())
    path = folder / "ledger" / "events-1.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[10] = "\x00garbage\n"
    path.write_text("".join(lines) + '{"type": "ener')
    report = build_report(folder)
    assert report.ledger.corrupt == ["events-1.jsonl:11"]
    assert report.ledger.num_torn == 1
    assert "events-1.jsonl:11" in render_markdown(report)
    assert "events-1.jsonl:11" in render_html(report)


@pytest.mark.parametrize("kinds", [["run"], ["note"], ["run", "node", "phase"], ["step"], ["energy"]])
def test_a_run_that_has_hardly_begun_renders_without_inventing_numbers(
    tmp_path: Path, kinds: list[str]
) -> None:
    rows = [row for row in synthetic_run(ended=False) if row["type"] in kinds]
    report = build_report(write_run(tmp_path, rows), LONG_AFTER)
    text = render_markdown(report) + " ".join(_parse(render_html(report)).text)
    jsonschema.validate(json.loads(render_json(report)), report_json_schema())
    if "energy" not in kinds:
        assert report.energy_j.total is None
        assert set(report.energy_j.by_use.values()) == {None}
        assert report.joules_per_sample is None
        assert "not measured" in text
        assert " 0 J" not in text


def test_a_loss_that_is_not_finite_is_unknown(tmp_path: Path) -> None:
    rows = Rows()
    rows.run()
    rows.node()
    rows.step(1, 0.0, 1.0, loss=2.0)
    rows.step(2, 1.0, 2.0, loss=math.nan)
    report = build_report(write_run(tmp_path, rows.rows), LONG_AFTER)
    assert (report.loss.first, report.loss.last) == (2.0, None)
    assert _parse(render_html(report)).tags >= {"svg"}


def test_holds_are_listed_but_not_marked(tmp_path: Path) -> None:
    rows = Rows()
    rows.run()
    rows.node()
    same: dict[str, Any] = {"num_workers": 2}
    rows.add(
        "decision", 5.0, decision_id="h", at_s=5.0, action="maintain", reason="all is well", outcome="held",
        setpoint_before=same, setpoint_after=same,
    )  # fmt: skip
    rows.energy(0.0, 10.0, 5.0, node=NODE)
    report = build_report(write_run(tmp_path, rows.rows), LONG_AFTER)
    html = render_html(report)
    assert 'class="mark decision"' not in html
    assert "all is well" in html
    assert "1 further decision left the setpoint as it was" in render_markdown(report)


def test_counts_have_whole_ticks() -> None:
    assert ticks(0.0, 4.3, 2, whole=True) == [0.0, 2.0, 4.0]
    assert ticks(0.0, 2.2, 3, whole=True) == [0.0, 1.0, 2.0]
    assert ticks(0.0, 1.1, 2, whole=True) == [0.0, 1.0]


def test_words() -> None:
    assert change({"num_workers": 4, "precision": "fp32"}, {"num_workers": 2, "precision": "bf16"}) == (
        "workers 4 → 2, precision fp32 → bf16"
    )
    assert change({"power_limit_w": None}, {"power_limit_w": 250.0}) == "power limit unset → 250 W"
    assert change({"num_workers": 2}, {"num_workers": 2}) == "no change"
    assert pairs({"power_w": 420.04, "samples_per_second": 10.5, "x": None}) == "power 420 W, 10.5 samples/s"
    assert number(None, "W") == "not measured"
    assert number(0.00001234, "J") == "1.23e-05 J"
    assert number(12345.6) == "12\u202f346"
    assert cell("a|b\n<i>\\") == "a\\|b &lt;i>\\\\"


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e9), num=st.integers(2, 12))
def test_ticks_are_few_ordered_and_inside(low: float, span: float, num: int) -> None:
    found = ticks(low, low + span, num)
    assert len(found) <= num + 2
    assert found == sorted(found)
    slack = 1e-6 * (span + abs(low))
    assert all(low - slack <= tick <= low + span + slack for tick in found)
