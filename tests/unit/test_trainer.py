"""What the trainer decides before Ray is started: which run this is, what it goes on from, what is removed.

Real: the configuration, the data and its cache, the run's folder, local storage, and the command line where
it is asked. Pretended: the cluster (it says how many devices there are, and the run ends where its actors
would start), and object storage (fsspec's memory file system through the storage's own way to it).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from eadt import trainer as trainer_module
from eadt.cli import app
from eadt.cluster import Devices
from eadt.config import config_from_dict
from eadt.coordination.settings import RunSettings
from eadt.errors import ConfigError, EnvironmentFailure
from eadt.trainer import EnergyAdaptiveTrainer, set_ledger_aside
from eadt.training.checkpoint import CheckpointStore, RunFile, Storage
from eadt.training.state import StateLayout, StateSlot

LAYOUT = StateLayout(("w",), ((4,),), ("fp32",))


class Started(EnvironmentFailure):
    """The run came as far as its actors."""


@dataclass
class FakeCluster:
    """Stands for :class:`eadt.cluster.Cluster`."""

    num_devices: int = 1
    settings: RunSettings | None = None
    connected: bool = False
    connects: bool = True

    def connect(self, config: Any) -> FakeCluster:
        self.connected = True
        if not self.connects:
            raise EnvironmentFailure("Ray does not answer", code="EADT-301")
        return self

    def is_joined(self) -> bool:
        return False

    def disconnect(self) -> None: ...

    def devices(self, config: Any) -> Devices:
        return Devices(False, self.num_devices, 8.0)

    def start_run(self, config: Any, settings: RunSettings, devices: Devices, on_event: Any) -> Any:
        self.settings = settings
        raise Started("as far as it goes", code="EADT-399")


@dataclass
class Runs:
    """Starts runs and puts checkpoints into their storage, as their coordinators would."""

    folder: Path
    cluster: FakeCluster
    events: list[dict[str, Any]] = field(default_factory=list)

    def config(self, name: str = "demo", **sections: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "run": {"name": name, "folder": str(self.folder / name)},
            "training": {
                "train_function": "own:train",
                "tokenizer_name_or_path": "byte",
                "dataset_path": str(self.folder / "text.txt"),
                "sequence_length": 32,
                "train_batch_size": 12,
                "per_device_train_batch_size": 3,
                "max_steps": 100,
            },
            "elastic": {"num_workers": 1, "max_workers": 4},
            "power": {"source": "estimate"},
        }
        for key, section in sections.items():
            values[key] = {**values.get(key, {}), **section}
            values[key] = {name: value for name, value in values[key].items() if value is not None}
        return values

    def start(self, name: str = "demo", *, fresh: bool = False, **sections: Any) -> RunSettings:
        """Start a run; returns what its coordinator would be given."""
        self.cluster.settings, self.cluster.connected = None, False
        config = config_from_dict(self.config(name, **sections))
        with pytest.raises(Started):
            EnergyAdaptiveTrainer(config, on_event=self.events.append, fresh=fresh).fit()
        assert self.cluster.settings is not None
        return self.cluster.settings

    def refused(self, **options: Any) -> ConfigError:
        """Start a run that is refused before Ray."""
        self.cluster.connected = False
        with pytest.raises(ConfigError) as caught:
            EnergyAdaptiveTrainer(config_from_dict(self.config(**options)), on_event=self.events.append).fit()
        assert not self.cluster.connected
        assert caught.value.exit_status == 2
        return caught.value

    def checkpoint(self, settings: RunSettings, step: int) -> CheckpointStore:
        """A checkpoint of a run."""
        store = CheckpointStore(settings.storage_path, settings.run_id)
        slot = StateSlot(self.folder / f"slot-{uuid.uuid4().hex}", LAYOUT, writable=True)
        shard = store.write_shard(step, 0, slot, [(0, 4)], "a")
        store.publish(step, LAYOUT, {}, [shard], "periodic", {}, settings.sample_order)
        slot.close()
        return store

    def notes(self, code: str) -> list[str]:
        return [event["text"] for event in self.events if event.get("code") == code]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    cluster = FakeCluster()
    monkeypatch.setattr(trainer_module, "Cluster", cluster)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i % 997}\n" for i in range(400)))
    return Runs(tmp_path, cluster)


@pytest.fixture(params=["the run's folder", "a shared folder", "object storage"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The section ``storage`` of runs that lie there."""
    if request.param == "object storage":
        from fsspec.implementations.memory import MemoryFileSystem

        yield {"path": f"memory://{uuid.uuid4().hex}/runs"}
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]
    else:
        yield {"path": str(tmp_path / "shared") if request.param == "a shared folder" else None}


# -- which run this is -------------------------------------------------------------------------------------


def test_the_same_command_goes_on_with_the_run(runs: Runs, storage: dict[str, Any]) -> None:
    first = runs.start(storage=storage)
    assert first.run_id.startswith("demo-")
    runs.checkpoint(first, 10)
    second = runs.start(storage=storage)
    assert second.run_id == first.run_id
    assert CheckpointStore(second.storage_path, second.run_id).steps() == [10]


def test_never_resuming_leaves_old_checkpoints_alone_and_they_it(runs: Runs, storage: dict[str, Any]) -> None:
    """Its checkpoints have lower steps than those that are there: they must not be the ones to go."""
    old = runs.checkpoint(runs.start(storage=storage), 500)
    never = {"resume": "never"}
    settings = runs.start(storage=storage, checkpoint=never)
    new = runs.checkpoint(settings, 10)
    new.prune(1)
    assert (old.steps(), new.steps()) == ([500], [10])
    # Its own coordinator finds what it has written, and so does the next start that may resume.
    assert runs.start(storage=storage).run_id == settings.run_id
    assert len({settings.run_id, runs.start(storage=storage, checkpoint=never).run_id}) == 2
    assert (old.steps(), new.steps()) == ([500], [10])


def test_two_runs_in_one_storage_keep_apart(runs: Runs, tmp_path: Path) -> None:
    storage = {"path": str(tmp_path / "shared")}
    one, other = runs.start("one", storage=storage), runs.start("other", storage=storage)
    kept = runs.checkpoint(one, 900)
    short = runs.checkpoint(other, 10)
    short.prune(1)
    kept.prune(1)
    assert (kept.steps(), short.steps()) == ([900], [10])
    assert runs.start("other", storage=storage).run_id == other.run_id


def test_a_runs_folder_that_was_moved_takes_its_run_along(runs: Runs, tmp_path: Path) -> None:
    first = runs.start()
    runs.checkpoint(first, 10)
    (tmp_path / "demo").rename(tmp_path / "elsewhere")
    moved = runs.start(run={"folder": str(tmp_path / "elsewhere")})
    assert moved.run_id == first.run_id
    assert CheckpointStore(moved.storage_path, moved.run_id).steps() == [10]


def test_a_run_file_that_cannot_be_read_is_no_new_run(runs: Runs, tmp_path: Path) -> None:
    runs.checkpoint(runs.start(), 10)
    (tmp_path / "demo" / "run.json").write_text('{"run_id": "dem')
    error = runs.refused()
    assert error.code == "EADT-254"
    assert "run.json" in error.what
    (tmp_path / "demo" / "run.json").write_text('{"run_id": "../..", "name": "demo"}')
    assert runs.refused().code == "EADT-254"
    assert runs.start(fresh=True).run_id.startswith("demo-")


def test_a_run_file_of_an_earlier_version_is_read(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "run.json").write_text('{"run_id": "demo-abc123", "name": "demo"}')
    assert runs.start(storage={"path": str(tmp_path / "shared")}).run_id == "demo-abc123"


def test_a_storage_that_knows_more_than_the_folder_is_said(runs: Runs, tmp_path: Path) -> None:
    storage = {"path": str(tmp_path / "shared")}
    first = runs.start(storage=storage)
    runs.checkpoint(first, 10)
    runs.checkpoint(runs.start("demo-2", storage=storage), 10)
    assert runs.notes("EADT-259") == []
    (tmp_path / "demo").rename(tmp_path / "lost")
    second = runs.start(storage=storage)
    assert second.run_id != first.run_id
    (note,) = runs.notes("EADT-259")
    assert f"({first.run_id})" in note


# -- starting over -----------------------------------------------------------------------------------------


def test_fresh_removes_the_run_wherever_it_lies_and_no_other(runs: Runs, storage: dict[str, Any]) -> None:
    other = runs.checkpoint(runs.start("other", storage=storage), 700)
    first = runs.start(storage=storage)
    old = runs.checkpoint(first, 500)
    again = runs.start(storage=storage, checkpoint={"resume": "never"})
    between = runs.checkpoint(again, 20)
    second = runs.start(fresh=True, storage=storage)
    assert len({first.run_id, again.run_id, second.run_id}) == 3
    for gone in (old, between):
        assert gone.storage.files(gone.folder) == {}
    assert other.steps() == [700]
    assert runs.notes("EADT-355") == []
    # And it goes on with itself afterwards, not with what was.
    runs.checkpoint(second, 10)
    assert runs.start(storage=storage).run_id == second.run_id


def test_fresh_finds_checkpoints_in_the_storage_of_then(runs: Runs, tmp_path: Path) -> None:
    old = runs.checkpoint(runs.start(storage={"path": str(tmp_path / "then")}), 500)
    runs.start(fresh=True, storage={"path": str(tmp_path / "now")})
    assert old.storage.files(old.folder) == {}


def test_what_fresh_could_not_remove_is_said_and_tried_again(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = {"path": str(tmp_path / "shared")}
    first = runs.start(storage=storage)
    old = runs.checkpoint(first, 500)
    with monkeypatch.context() as stuck:
        stuck.setattr(Storage, "delete_folder", lambda self, name: None)
        runs.start(fresh=True, storage=storage)
    (note,) = runs.notes("EADT-355")
    assert first.run_id in note
    assert old.storage.files(old.folder) != {}
    runs.start(fresh=True, storage=storage)
    assert old.storage.files(old.folder) == {}


def test_fresh_removes_nothing_when_the_run_cannot_start(runs: Runs) -> None:
    old = runs.checkpoint(runs.start(), 500)
    for changes in ({"train_batch_size": 10**6}, {"sequence_length": 10**6}):
        with pytest.raises(ConfigError):
            EnergyAdaptiveTrainer(config_from_dict(runs.config(training=changes)), fresh=True).fit()
    assert old.steps() == [500]


def test_fresh_refuses_a_folder_that_holds_no_run(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        EnergyAdaptiveTrainer(config_from_dict(runs.config()), fresh=True).fit()
    assert caught.value.code == "EADT-207"
    assert (tmp_path / "demo" / "thesis.tex").read_text() == "mine"


# -- going on with other settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "lines"),
    [
        ({"training": {"train_batch_size": 24}}, ["training.train_batch_size: was 12, is 24"]),
        ({"run": {"seed": 3}}, ["run.seed: was 0, is 3"]),
        ({"training": {"sequence_length": 64}}, ["training.sequence_length: was 32, is 64"]),
        ({"training": {"dataset_path": "other.txt"}}, ["the data: was", "other.txt (tokens "]),
        (
            {"training": {"train_batch_size": 6}, "run": {"seed": 3}},
            ["training.train_batch_size: was 12, is 6", "run.seed: was 0, is 3"],
        ),
    ],
)
def test_other_settings_are_refused_before_ray_with_what_differs(
    runs: Runs, tmp_path: Path, sections: dict[str, Any], lines: list[str]
) -> None:
    store = runs.checkpoint(runs.start(), 40)
    if "dataset_path" in sections.get("training", {}):
        other = tmp_path / "other.txt"
        other.write_text((tmp_path / "text.txt").read_text().replace("line", "word"))
        sections = {"training": {"dataset_path": str(other)}}
    error = runs.refused(**sections)
    assert error.code == "EADT-257"
    assert "step 40" in error.what
    for line in lines:
        assert line in error.what
    assert error.what.count(": was ") == max(1, len([line for line in lines if ": was" in line]))
    assert "run.name" in error.fix
    assert "--fresh" in error.fix
    assert store.steps() == [40]
    assert runs.start(fresh=True, **sections).sample_order.train_batch_size > 0


def test_data_that_was_only_moved_is_the_same(runs: Runs, tmp_path: Path) -> None:
    runs.checkpoint(runs.start(), 40)
    (tmp_path / "copy.txt").write_bytes((tmp_path / "text.txt").read_bytes())
    runs.start(training={"dataset_path": str(tmp_path / "copy.txt")})


def test_nothing_is_compared_where_nothing_is_gone_on_from(runs: Runs) -> None:
    runs.checkpoint(runs.start(), 40)
    changed = {"train_batch_size": 24}
    assert runs.start(training=changed, checkpoint={"resume": "never"}).train_batch_size == 24
    assert runs.start("another", training=changed).train_batch_size == 24


def test_another_storage_is_refused_while_the_checkpoints_are_in_the_old_one(
    runs: Runs, tmp_path: Path
) -> None:
    then, now = {"path": str(tmp_path / "then")}, {"path": str(tmp_path / "now")}
    first = runs.start(storage=then)
    runs.start(storage=now)  # there was no checkpoint yet: nothing is lost
    runs.start(storage=then)
    runs.checkpoint(first, 10)
    error = runs.refused(storage=now)
    assert error.code == "EADT-257"
    assert f"storage.path: was {then['path']}, is {now['path']}" in error.what
    # Taken along, they are gone on from.
    (tmp_path / "then" / "checkpoints").rename(tmp_path / "now" / "checkpoints")
    assert runs.start(storage=now).run_id == first.run_id


# -- the batch on other devices ----------------------------------------------------------------------------

DERIVED: dict[str, Any] = {
    "training": {"train_batch_size": None},
    "elastic": {"num_workers": None, "max_workers": None},
}
"""A run whose batch is 3 for each worker, of which it has two a device."""


def test_other_devices_keep_the_batch(runs: Runs) -> None:
    runs.cluster.num_devices = 2
    first = runs.start(**DERIVED)
    assert (first.setpoint.num_workers, first.train_batch_size) == (4, 12)
    runs.start(**DERIVED)
    assert runs.notes("EADT-258") == []
    runs.checkpoint(first, 10)
    for num_devices, num_workers in [(1, 2), (2, 4), (3, 6), (4, 6)]:  # eight workers cannot hold 12
        runs.events.clear()
        runs.cluster.num_devices = num_devices
        later = runs.start(**DERIVED)
        assert (later.setpoint.num_workers, later.train_batch_size) == (num_workers, 12)
        assert later.sample_order == first.sample_order
        assert len(runs.notes("EADT-258")) == (num_workers != 4)
    assert "stays 12" in runs.notes("EADT-258")[0]


def test_a_number_of_workers_that_is_named_keeps_the_batch_too(runs: Runs) -> None:
    by_workers = {"training": {"train_batch_size": None}, "elastic": {"num_workers": 4}}
    first = runs.start(**by_workers)
    assert first.train_batch_size == 12
    runs.checkpoint(first, 10)
    assert runs.start(**{**by_workers, "elastic": {"num_workers": 2}}).train_batch_size == 12
    error = runs.refused(**{**by_workers, "elastic": {"num_workers": 5, "max_workers": 8}})
    assert error.code == "EADT-210"
    # A new run has its own.
    assert runs.start("new", **{**by_workers, "elastic": {"num_workers": 2}}).train_batch_size == 6


# -- at the command line -----------------------------------------------------------------------------------


def eadt_run(runs: Runs, *arguments: str) -> tuple[int, str]:
    (runs.folder / "demo.yaml").write_text(yaml.safe_dump(runs.config()))
    result = CliRunner().invoke(app, ["run", str(runs.folder / "demo.yaml"), "--plain", *arguments])
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


def test_the_commands_option_removes_the_run(runs: Runs) -> None:
    first = runs.start()
    old = runs.checkpoint(first, 40)
    status, text = eadt_run(runs)
    assert (status, old.steps()) == (3, [40])
    assert "EADT-399" in text
    assert runs.cluster.settings is not None
    assert runs.cluster.settings.run_id == first.run_id
    status, _ = eadt_run(runs, "--fresh")
    assert old.storage.files(old.folder) == {}
    assert runs.cluster.settings.run_id != first.run_id
    run = json.loads((runs.folder / "demo" / "run.json").read_text())
    assert run["run_id"] == runs.cluster.settings.run_id


def test_the_command_says_what_differs_and_ends_with_2(runs: Runs) -> None:
    runs.checkpoint(runs.start(), 40)
    runs.cluster.connected = False
    status, text = eadt_run(runs, "--set", "run.seed=5", "--set", "training.train_batch_size=6")
    assert status == 2
    assert "EADT-257" in text
    assert "training.train_batch_size: was 12, is 6 run.seed: was 0, is 5" in text
    assert not runs.cluster.connected


def test_a_start_that_fails_at_ray_has_not_lost_its_run(runs: Runs) -> None:
    first = runs.start()
    runs.checkpoint(first, 40)
    runs.cluster.connects = False
    assert eadt_run(runs)[0] == 3
    runs.cluster.connects = True
    assert runs.start().run_id == first.run_id


def test_the_ledger_of_another_run_in_the_folder_is_kept_apart(tmp_path: Path) -> None:
    """As after `checkpoint.resume: never`: totals of two runs must not be added up."""
    first = RunFile.begin("r", None)
    first.write(tmp_path)
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "events-1.jsonl").write_text("{}\n")
    assert set_ledger_aside(tmp_path, first) is None, "the same run goes on"
    kept = set_ledger_aside(tmp_path, RunFile.begin("r", None, first.places))
    assert kept == tmp_path / f"ledger-{first.run_id}"
    assert (kept / "events-1.jsonl").read_text() == "{}\n"
    assert not (tmp_path / "ledger").exists()
    assert set_ledger_aside(tmp_path / "new", RunFile.begin("r", None)) is None
