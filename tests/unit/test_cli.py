"""The command line without Ray: a fake trainer stands where training would start.

What is real: argument parsing, configuration, the ledger and its report, exit statuses, and (as processes of
their own) the program's speed and its one JSON document.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from eadt import clock
from eadt.cli import app
from eadt.cli.overrides import load_with_overrides
from eadt.cli.status import describe_decision
from eadt.config import InvalidConfigError
from eadt.errors import DeadlineError, EadtError, EnvironmentFailure
from eadt.record.rows import ChangeRow, DecisionRow, LedgerRow, ObservationRow, encode
from eadt.record.status import RunStatus
from eadt.report import build_report
from eadt.units import Quantity
from tests.unit.ledger_factory import START_UNIX_S, Rows
from tests.unit.status_factory import make_status

CONFIG = """\
training:
  model_config: {model_type: gpt_neox, hidden_size: 32, num_attention_heads: 4}
  tokenizer_name_or_path: byte
  dataset_path: python-stdlib
  train_batch_size: 12
  per_device_train_batch_size: 6
  max_steps: 600
  learning_rate: 1e-3
elastic:
  num_workers: 2
  max_workers: 3
"""
TWO = {"num_workers": 2, "workers_per_gpu": 2, "mps_active_thread_percentage": 50}
THREE = {"num_workers": 3, "workers_per_gpu": 3, "mps_active_thread_percentage": 35}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a configuration in it and no cluster around it."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_PROMETHEUS_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def eadt(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def write_ledger(run_folder: Path, status: str = "completed", began_unix_s: float = START_UNIX_S) -> None:
    """A small ledger: two steps, one decision that was kept, the change that it led to."""
    rows = Rows(began_unix_s)
    rows.session(name=run_folder.name, train_batch_size=12, max_steps=2)
    rows.node()
    rows.generation(0.0, setpoint=TWO, world_size=2)
    rows.steps(1, [0.0, 10.0], [10.0, 10.0], loss=[3.0, 2.0], samples=12)
    rows.energy(0.0, 20.0, 600.0, generation=1, setting=1)
    rows.time(0.0, 20.0, generation=1, setting=1)
    rows.add(
        ObservationRow(
            at_s=20.0, window_s=20.0, setpoint=TWO, samples_per_second=1.2, power_w=30.0, quality="estimated",
            efficiency_samples_per_j=0.04,
        )
    )  # fmt: skip
    decision: dict[str, Any] = {
        "decision_id": "d1",
        "at_s": 20.0,
        "action": "scale_replicas",
        "reason": "Power is high.",
        "setpoint_before": TWO,
        "setpoint_after": THREE,
        "expected": {"summary": "more samples a joule."},
    }
    rows.add(DecisionRow(**decision))
    rows.add(DecisionRow(**decision, outcome="kept", measured={"verdict": "Kept: efficiency rose by 8 %."}))
    rows.add(
        ChangeRow(
            at_s=21.0, from_workers=2, to_workers=3, kind="in_place", reason="d1", seconds=0.25, lost_steps=0,
            setpoint_before=TWO, setpoint_after=THREE, decision_id="d1",
        )
    )  # fmt: skip
    rows.generation(21.0, 2, 2, setpoint=THREE, step=2)
    if status != "running":
        rows.end(22.0, status)
    rows.write(run_folder)


@dataclass
class FakeTrainer:
    """Stands for :class:`eadt.trainer.EnergyAdaptiveTrainer`; remembers what it was given."""

    status: str = "completed"
    error: EadtError | None = None
    raises: BaseException | None = None
    prints: str = ""
    config: Any = None
    fresh: bool = False
    on_event: Callable[[dict[str, Any]], None] = field(default=lambda _: None)

    def __call__(self, config: Any, *, on_event: Any, fresh: bool) -> "FakeTrainer":
        self.config, self.on_event, self.fresh = config, on_event, fresh
        return self

    def fit(self) -> Any:
        self.on_event({"type": "phase", "text": "starting Ray (local, 2 CPUs)"})
        if self.prints:
            print(self.prints)
        if self.raises is not None:
            raise self.raises
        folder = self.config.run_folder
        write_ledger(folder, self.status)
        result = ModuleType("result")
        result.__dict__.update(
            run_folder=folder,
            status=self.status,
            report=build_report(folder),
            report_paths={"html": folder / "report.html"},
            final_model_path=None,
            error=self.error,
        )
        return result


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> FakeTrainer:
    fake = FakeTrainer()
    module = ModuleType("eadt.trainer")
    module.__dict__["EnergyAdaptiveTrainer"] = fake
    monkeypatch.setitem(sys.modules, "eadt.trainer", module)
    return fake


# -- overrides ---------------------------------------------------------------------------------------------


def test_set_changes_a_value_and_leaves_the_rest(folder: Path) -> None:
    config = load_with_overrides(
        Path("run.yaml"),
        [
            "training.max_steps=20",
            "training.learning_rate=5e-4",
            "policy.power_low_w=20",
            "policy.power_high_w=30",
            "training.model_config.hidden_size=64",
        ],
        name="other",
    )
    assert config.training.max_steps == 20
    assert config.training.learning_rate == pytest.approx(5e-4)
    assert (config.policy.power_low_w, config.policy.power_high_w) == (20, 30)
    assert config.training.model_config_overrides == {
        "model_type": "gpt_neox",
        "hidden_size": 64,
        "num_attention_heads": 4,
    }
    assert config.training.train_batch_size == 12
    assert config.run_folder == Path("runs/other")


def test_the_run_keeps_the_files_name_when_something_is_set(folder: Path) -> None:
    assert load_with_overrides(Path("run.yaml"), ["run.seed=3"]).run.name == "run"


def test_a_value_adopted_from_deepspeed_follows_its_override(folder: Path) -> None:
    (folder / "run.yaml").write_text(CONFIG + "deepspeed: {gradient_clipping: 1.0}\npolicy:\n")
    config = load_with_overrides(Path("run.yaml"), ["deepspeed.gradient_clipping=2.0"])
    assert config.training.max_grad_norm == 2.0


def test_an_entry_of_a_list_can_be_set(folder: Path) -> None:
    schedule = (
        "policy: {type: schedule, schedule: [{at_step: 5, num_workers: 1}, {at_step: 9, num_workers: 3}]}\n"
    )
    (folder / "run.yaml").write_text(CONFIG + schedule)
    config = load_with_overrides(Path("run.yaml"), ["policy.schedule[1].at_step=50"])
    assert [entry.at_step for entry in config.policy.schedule] == [5, 50]
    with pytest.raises(InvalidConfigError, match=r"no entry \[7\]"):
        load_with_overrides(Path("run.yaml"), ["policy.schedule[7].at_step=50"])


def test_problems_of_set_are_located_at_the_option_and_all_listed(folder: Path) -> None:
    settings = ["training.max_steps=abc", "policy.power_low=9", "training.lr=1"]
    with pytest.raises(InvalidConfigError) as caught:
        load_with_overrides(Path("run.yaml"), settings)
    problems = {problem.key: problem for problem in caught.value.problems}
    assert problems["training.max_steps"].file == "--set training.max_steps=abc"
    assert problems["policy.power_low"].nearest == "policy.power_low_w"
    assert set(problems) == {"training.max_steps", "policy.power_low", "training.lr"}


def test_a_conflict_with_the_file_is_located_in_the_file(folder: Path) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        load_with_overrides(Path("run.yaml"), ["elastic.max_workers=1"])
    (problem,) = caught.value.problems
    assert (problem.key, problem.file, problem.line) == ("elastic.num_workers", "run.yaml", 10)


@pytest.mark.parametrize("text", ["training.max_steps", "=3", "training.max_steps: 3"])
def test_set_without_a_key_and_a_value_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(InvalidConfigError, match="must have the form key=value"):
        load_with_overrides(Path("run.yaml"), [text])


# -- validate and schema -------------------------------------------------------------------------------------


def test_validate_says_what_the_run_means(folder: Path) -> None:
    result = eadt("validate", "run.yaml")
    assert result.exit_code == 0
    assert "run.yaml is valid" in result.stdout
    assert "12 sequences a step" in result.stdout


def test_validate_lists_problems_with_file_and_line_and_ends_with_2(folder: Path) -> None:
    (folder / "run.yaml").write_text(CONFIG.replace("max_steps: 600", "max_step: 600"))
    result = eadt("validate", "run.yaml")
    assert result.exit_code == 2
    assert "run.yaml:7: training.max_step: unknown key; did you mean max_steps?" in result.stderr
    assert "EADT-201" in result.stderr
    assert result.stdout == ""


def test_validate_finds_a_batch_that_no_worker_count_holds(folder: Path) -> None:
    result = eadt("validate", "run.yaml", "--set", "training.train_batch_size=13")
    assert result.exit_code == 2
    assert "2 workers cannot hold a global batch of 13" in result.stderr


def test_validate_as_json_is_one_document_for_good_and_bad(folder: Path) -> None:
    good = eadt("validate", "run.yaml", "-o", "json")
    assert json.loads(good.stdout)["valid"] is True
    bad = eadt("validate", "run.yaml", "--set", "training.max_steps=0", "-o", "json")
    error = json.loads(bad.stdout)["error"]
    assert bad.exit_code == 2
    assert (error["code"], error["exit_status"]) == ("EADT-201", 2)
    assert error["problems"][0]["key"] == "training.max_steps"


def test_schema_is_json(folder: Path) -> None:
    assert "training" in json.loads(eadt("schema").stdout)["properties"]


# -- run -----------------------------------------------------------------------------------------------------


def test_run_shows_what_it_does_and_what_came_of_it(folder: Path, trainer: FakeTrainer) -> None:
    result = eadt("run", "run.yaml", "--name", "demo", "--fresh", "--set", "training.max_steps=2")
    assert result.exit_code == 0, result.output
    assert (trainer.config.run.name, trainer.config.training.max_steps, trainer.fresh) == ("demo", 2, True)
    for part in (
        "starting Ray (local, 2 CPUs)",
        "demo: completed, 2 steps",
        "loss:      3.0000 → 2.0000",
        "600 ± 180 J (estimated), 25.0 ± 7.5 J/sample",
        "workers 2 → 3",
        "longest pause 0.25 s",
        "runs/demo/report.html",
    ):
        assert part in result.stdout


def test_run_as_json_keeps_everything_else_off_standard_output(folder: Path, trainer: FakeTrainer) -> None:
    trainer.prints = "a library says something"
    result = eadt("run", "run.yaml", "-o", "json")
    document = json.loads(result.stdout)
    assert document["status"] == "completed"
    assert document["report"]["energy_j"]["total"]["value"] == 600.0
    assert document["error"] is None
    assert "a library says something" in result.stderr
    assert "starting Ray" in result.stderr


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        ("completed", None, 0),
        ("interrupted", None, 130),
        ("failed", None, 1),
        ("failed", EnvironmentFailure("no room", code="EADT-300", means="it stopped", fix="make room"), 3),
        ("failed", DeadlineError("too late", code="EADT-400"), 4),
    ],
)
def test_run_ends_with_the_status_of_what_happened(
    folder: Path, trainer: FakeTrainer, status: str, error: EadtError | None, expected: int
) -> None:
    trainer.status, trainer.error = status, error
    result = eadt("run", "run.yaml")
    assert result.exit_code == expected
    if error is not None:
        for part in (error.code, error.what, error.means, error.fix):
            assert part in result.stderr
    assert ("the same command goes on" in result.stdout) == (status == "interrupted")


def test_an_error_of_ours_has_no_traceback(folder: Path, trainer: FakeTrainer) -> None:
    trainer.raises = EnvironmentFailure("Ray does not answer", code="EADT-301", fix="start it")
    result = eadt("run", "run.yaml")
    assert result.exit_code == 3
    assert "EADT-301: Ray does not answer" in result.stderr
    assert "Traceback" not in result.output


def test_an_unexpected_error_leaves_its_traceback_in_a_file(folder: Path, trainer: FakeTrainer) -> None:
    (folder / "runs" / "run").mkdir(parents=True)
    trainer.raises = ZeroDivisionError("one by zero")
    result = eadt("run", "run.yaml", "-o", "json")
    assert result.exit_code == 1
    assert "unexpected error: ZeroDivisionError: one by zero" in result.stderr
    assert "Traceback" not in result.output
    (file,) = (folder / "runs" / "run").glob("eadt-crash-*.txt")
    assert file.name in result.stderr
    assert "ZeroDivisionError: one by zero" in file.read_text()
    assert json.loads(result.stdout)["error"]["exit_status"] == 1


def test_ctrl_c_ends_with_130(folder: Path, trainer: FakeTrainer) -> None:
    trainer.raises = KeyboardInterrupt()
    result = eadt("run", "run.yaml", "-o", "json")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["error"]["code"] == "interrupted"


def test_a_bad_configuration_never_reaches_the_trainer(folder: Path, trainer: FakeTrainer) -> None:
    result = eadt("run", "run.yaml", "--set", "training.dataset_path=missing-folder")
    assert result.exit_code == 2
    assert "missing-folder" in result.stderr
    assert trainer.config is None


def test_require_names_what_is_missing_and_its_fix(
    folder: Path, trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eadt.node import capabilities
    from eadt.node.capabilities import Capability

    found = [Capability("nvml", "missing", "no driver", "install it"), Capability("memory", "ok", "enough")]
    monkeypatch.setattr(capabilities, "survey", lambda config: found)
    assert eadt("run", "run.yaml", "--require", "memory").exit_code == 0
    trainer.config = None
    for name in ("nvml", "powercap"):
        refused = eadt("run", "run.yaml", "--require", name)
        assert refused.exit_code == 3
        assert "no driver" in refused.stderr
        assert "install it" in refused.stderr
    unknown = eadt("run", "run.yaml", "--require", "antigravity")
    assert unknown.exit_code == 2
    assert trainer.config is None


# -- report and status -------------------------------------------------------------------------------------


def test_report_writes_its_files_and_says_where(folder: Path) -> None:
    write_ledger(Path("runs/demo"))
    result = eadt("report", "demo", "--format", "markdown", "--format", "json")
    assert result.exit_code == 0, result.output
    assert {path.name for path in Path("runs/demo").glob("report.*")} == {"report.md", "report.json"}
    assert "runs/demo/report.md" in result.stdout


def test_report_as_json_writes_no_file(folder: Path) -> None:
    write_ledger(Path("runs/demo"))
    document = json.loads(eadt("report", "runs/demo", "-o", "json").stdout)
    energy = document["energy_j"]
    assert energy["total"] == {
        "value": 600.0, "uncertainty": 180.0, "at_least": False, "qualities": ["estimated"]
    }  # fmt: skip
    assert sum(part["value"] for part in energy["by_use"].values()) == 600.0
    assert list(Path("runs/demo").glob("report.*")) == []


def test_report_reads_the_digest_or_all_of_the_ledger(folder: Path) -> None:
    """A ledger of which a row was changed behind the digest's back: only the whole reading sees it."""
    write_ledger(Path("runs/demo"))
    file = Path("runs/demo/ledger/events-1.jsonl")
    file.write_bytes(file.read_bytes().replace(b'"joules":[600.0]', b'"joules":[700.0]'))

    def total(*options: str) -> float:
        document = json.loads(eadt("report", "demo", "-o", "json", *options).stdout)
        return float(document["energy_j"]["total"]["value"])

    assert total() == 600.0
    assert total("--from-ledger") == 700.0


def test_report_says_what_of_the_ledger_it_could_not_read(folder: Path) -> None:
    write_ledger(Path("runs/demo"))
    with Path("runs/demo/ledger/events-1.jsonl").open("ab") as file:
        file.write(b'garbage\n{"type": "ener')
    result = eadt("report", "demo")
    assert result.exit_code == 0, result.output
    assert "demo: completed, 2 steps" in result.stdout
    assert "ledger:    Damaged lines (1): events-1.jsonl:" in result.stdout
    assert "ledger:    The last line was cut off" in result.stdout


@pytest.mark.parametrize("command", ["report", "status"])
@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 2, "no row that can be used yet"),
        (b"garbage\n", 2, "events-1.jsonl:1"),
        (encode(LedgerRow(schema_version=99)) + b"\n", 3, "newer version of EADT"),
    ],
)
def test_a_ledger_that_holds_nothing_is_an_error_with_a_code_and_no_traceback(
    folder: Path, no_cluster: None, command: str, content: bytes, status: int, words: str
) -> None:
    Path("runs/demo/ledger").mkdir(parents=True)
    Path("runs/demo/ledger/events-1.jsonl").write_bytes(content)
    result = eadt(command, "demo")
    assert result.exit_code == status
    assert words in result.stderr
    assert "EADT-33" in result.stderr
    assert "to fix it" in result.stderr
    assert "Traceback" not in result.output


def test_report_of_a_run_that_is_not_there_names_those_that_are(folder: Path) -> None:
    write_ledger(Path("runs/demo"))
    result = eadt("report", "dmeo")
    assert result.exit_code == 2
    assert "runs here: demo" in result.stderr


def test_a_run_whose_name_can_be_no_folder_is_not_there(folder: Path) -> None:
    result = eadt("report", "x" * 5000)
    assert result.exit_code == 2
    assert "EADT-331" in result.stderr


@pytest.mark.parametrize("command", ["report", "status"])
def test_a_run_into_which_one_may_not_look_is_said_to_be_one(
    folder: Path, no_cluster: None, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    write_ledger(Path("runs/demo"))
    is_dir = Path.is_dir

    def refuse(self: Path) -> bool:  # the tests may run as root
        if self.name == "ledger":
            raise PermissionError(13, "Permission denied")
        return is_dir(self)

    monkeypatch.setattr(Path, "is_dir", refuse)
    result = eadt(command, "runs/demo")
    assert result.exit_code == 3
    assert "EADT-334: the run in runs/demo cannot be read: Permission denied" in result.stderr


def test_report_refuses_an_unknown_format(folder: Path) -> None:
    write_ledger(Path("runs/demo"))
    result = eadt("report", "demo", "--format", "pdf")
    assert result.exit_code == 2
    assert "name one of json, markdown, html, or none" in result.stderr


def test_status_of_a_run_that_has_ended_is_read_from_its_ledger(folder: Path) -> None:
    write_ledger(Path("runs/demo"))
    result = eadt("status")
    assert result.exit_code == 0, result.output
    for part in (
        "demo: completed (from its ledger)",
        "3 workers at 35 %",
        "step 2/2, loss 2.0000",
        "energy:      600 ± 180 J (estimated)",
        "25.0 ± 7.5 J/sample (estimated)",
        "useful 600 J",
        "1.20 samples/s, 30.0 W (estimated)",
        "2 workers at 50 % → 3 workers at 35 %",
        "Power is high.",
        "expected: more samples a joule.",
        "outcome:  Kept: efficiency rose by 8 %.",
    ):
        assert part in result.stdout


def test_status_and_report_show_the_same_figures(folder: Path) -> None:
    write_ledger(Path("runs/demo"))
    status = json.loads(eadt("status", "demo", "-o", "json").stdout)
    report = json.loads(eadt("report", "demo", "-o", "json").stdout)
    assert status["energy_j"] == report["energy_j"]["total"]
    assert status["joules_per_sample"] == report["joules_per_sample"]
    assert status["status"] == report["run"]["status"]
    assert status["energy_by_use"] == {
        use: part for use, part in report["energy_j"]["by_use"].items() if use in status["energy_by_use"]
    }


def test_status_says_how_often_a_decision_was_refused(folder: Path) -> None:
    refused = {
        "decision_id": "d0003", "at_s": 61.0, "action": "increase", "reason": "It was measured worse.",
        "setpoint_before": TWO, "setpoint_after": TWO, "expected": {"summary": "more power."},
        "measured": None, "outcome": "refused", "repeats": 4,
    }  # fmt: skip
    lines = describe_decision(refused)
    assert lines == ["at 61 s: decision d0003: increase (refused): It was measured worse. (4 times)"]


Answer = Callable[[str | None, str | None], RunStatus]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    """Puts a function in the place of asking over Ray."""

    def put(answer: Answer) -> None:
        module = ModuleType("eadt.status")
        module.__dict__["fetch_status"] = answer
        monkeypatch.setitem(sys.modules, "eadt.status", module)

    return put


@pytest.fixture
def no_cluster(answering: Callable[[Answer], None]) -> None:
    """No Ray cluster answers."""

    def answer(run: str | None, address: str | None) -> RunStatus:
        raise EnvironmentFailure("no Ray cluster runs on this machine", code="EADT-301", fix="start one")

    answering(answer)


def test_status_asks_the_run_that_goes_on(folder: Path, answering: Callable[[Answer], None]) -> None:
    write_ledger(Path("runs/demo"), status="running", began_unix_s=clock.unix_s() - 25)
    asked: list[tuple[str | None, str | None]] = []

    def answer(run: str | None, address: str | None) -> RunStatus:
        asked.append((run, address))
        return make_status(
            setpoint=TWO, desired=THREE, step=3, max_steps=9, loss=2.5, waiting_for="resources",
            energy_j=Quantity(1500.0, 30.0, at_least=True, qualities=("measured",)), phase="watching",
            notes=({"code": "EADT-410", "text": "no MPS here"},),
        )  # fmt: skip

    answering(answer)
    document = json.loads(eadt("status", "demo", "-o", "json").stdout)
    assert asked == [("synthetic-1", None)]
    assert (document["source"], document["setpoint"]["num_workers"]) == ("supervisor", 2)
    assert document["energy_j"]["at_least"] is True
    shown = eadt("status", "demo").stdout
    for part in (
        "demo: running (asked of the run)",
        "2 workers at 50 %, changing to 3 workers at 35 %",
        "step 3/9, loss 2.5000, 18.2 samples/s, 1 min 24 s and 2.30 kJ to go",
        "at least 1.500 ± 0.030 kJ (measured)",
        "31.3 ± 6.0 W (estimated)",
        "startup 300 J, useful 3.11 kJ",
        "waiting for: resources",
        "watching (policy threshold)",
        "note EADT-410: no MPS here",
    ):
        assert part in shown


def test_status_where_a_cluster_is_named_is_of_what_goes_on_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, answering: Callable[[Answer], None]
) -> None:
    write_ledger(Path("runs/demo"))  # completed, and here
    asked: list[tuple[str | None, str | None]] = []

    def answer(run: str | None, address: str | None) -> RunStatus:
        asked.append((run, address))
        return make_status(run="another", status="training")

    answering(answer)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "another: training (asked of the run" in eadt("status").stdout
    assert "demo: completed (from its ledger" in eadt("status", "demo").stdout
    monkeypatch.delenv("RAY_ADDRESS")
    assert "another: training" in eadt("status", "--address", "10.0.0.1:6379").stdout
    assert asked == [(None, None), (None, "10.0.0.1:6379")]


def test_status_falls_back_to_the_ledger_and_says_so(folder: Path, no_cluster: None) -> None:
    write_ledger(Path("runs/demo"), status="running", began_unix_s=clock.unix_s() - 25)
    result = eadt("status", "demo")
    assert result.exit_code == 0
    assert "The run did not answer (no Ray cluster runs on this machine)" in result.stderr
    assert re.search(r"demo: running, last heard of \S+ s ago \(from its ledger\)", result.stdout)
    assert json.loads(eadt("status", "demo", "-o", "json").stdout)["source"] == "ledger"


def test_a_run_that_ended_without_a_word_is_crashed_and_not_running_for_ever(
    folder: Path, no_cluster: None
) -> None:
    write_ledger(Path("runs/demo"), status="running", began_unix_s=clock.unix_s() - 201)
    result = eadt("status", "demo")
    assert re.search(r"demo: crashed, last heard of 3 min 0\d s ago \(from its ledger\)", result.stdout)
    assert "running" not in result.stdout
    assert "power:" not in result.stdout  # what it drew last is not what it draws
    report = json.loads(eadt("report", "demo", "-o", "json").stdout)
    assert (report["run"]["status"], report["partial"]) == ("crashed", True)
    assert "ended without a word" in report["partial_reason"]


def test_status_of_a_ledger_that_is_not_whole_says_what_is_missing(folder: Path) -> None:
    write_ledger(Path("runs/demo"))
    with Path("runs/demo/ledger/events-1.jsonl").open("ab") as file:
        file.write(b"garbage\n")
    result = eadt("status", "demo", "-o", "json")
    assert json.loads(result.stdout)["status"] == "completed"
    assert "is not whole. Damaged lines (1): events-1.jsonl:" in result.stderr


def test_status_asks_the_run_itself_also_where_its_ledger_cannot_be_read(
    folder: Path, answering: Callable[[Answer], None]
) -> None:
    Path("runs/demo/ledger").mkdir(parents=True)
    Path("runs/demo/ledger/events-1.jsonl").write_bytes(b"garbage\n")
    answering(lambda run, address: make_status(run=run))
    assert "demo: running (asked of the run)" in eadt("status", "demo").stdout


def test_status_without_any_run_says_why_there_is_none_to_ask(folder: Path, no_cluster: None) -> None:
    result = eadt("status")
    assert result.exit_code == 3
    assert "EADT-301: no Ray cluster runs on this machine" in result.stderr
    assert "start one" in result.stderr


# -- doctor --------------------------------------------------------------------------------------------------


def test_doctor_gives_each_line_a_state_and_every_trouble_a_fix(folder: Path) -> None:
    document = json.loads(eadt("doctor", "-o", "json").stdout)
    assert document["can_run"] is True
    found = {item["name"]: item for item in document["capabilities"]}
    assert {
        "python",
        "packages",
        "ray_cluster",
        "ray_token",
        "nvml",
        "shared_memory",
        "working_dir",
        "prometheus",
        "power_source",
    } <= set(found)
    for item in found.values():
        assert item["state"] == "ok" or item["fix"]


def test_doctor_ends_with_3_when_the_cluster_does_not_answer(folder: Path) -> None:
    result = eadt("doctor", "--address", "127.0.0.1:9")
    assert result.exit_code == 3
    assert "nothing answers at 127.0.0.1:9" in result.stdout


def test_doctor_warns_of_a_folder_that_is_too_large_to_submit(folder: Path) -> None:
    with (folder / "model.bin").open("wb") as file:
        file.truncate(101 << 20)
    result = eadt("doctor", "-o", "json")
    found = {item["name"]: item for item in json.loads(result.stdout)["capabilities"]}
    assert found["working_dir"]["state"] == "degraded"
    assert "model.bin" in found["working_dir"]["detail"]


@pytest.mark.parametrize(
    ("environment", "state", "part"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "degraded", "RAY_AUTH_MODE is disabled"),
        ({"RAY_AUTH_TOKEN": "secret-value"}, "ok", "taken from RAY_AUTH_TOKEN"),
        ({}, "ok", "there is no token"),
    ],
)
def test_doctor_says_where_the_token_comes_from_but_never_shows_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], state: str, part: str
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = eadt("doctor", "-o", "json")
    found = {item["name"]: item for item in json.loads(result.stdout)["capabilities"]}
    assert found["ray_token"]["state"] == state
    assert part in found["ray_token"]["detail"]
    assert "secret-value" not in result.output


# -- as a process --------------------------------------------------------------------------------------------


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from eadt.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "100"},
    )


def test_help_of_every_command_has_an_example() -> None:
    for command in ("run", "validate", "schema", "status", "report", "doctor"):
        assert f"eadt {command}" in CliRunner().invoke(app, [command, "--help"]).stdout.replace(
            "Usage: eadt", ""
        )


def test_help_and_validate_load_no_heavy_library(folder: Path) -> None:
    code = (
        "import sys\nfrom eadt.cli import app\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['validate', 'run.yaml', '--light']).exit_code == 0\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'ray', 'deepspeed', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_json_document_is_alone_on_standard_output_of_a_process(folder: Path) -> None:
    write_ledger(Path("runs/demo"))
    result = process("status", "demo", "-o", "json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["run"] == "demo"


def test_usage_errors_end_with_2(folder: Path) -> None:
    assert process("run").returncode == 2
    assert process("frobnicate").returncode == 2
