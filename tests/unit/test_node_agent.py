"""What a node agent does beside its engines: where things lie, what is cleared away, what is always told."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eadt.control.batch import plan_batch
from eadt.node import agent as agent_module
from eadt.node.agent import AgentSettings, NodeAgent, agent_settings
from eadt.training.engine_spec import ComputeShare, EngineSpec, TrainingJob
from tests.unit.keeping import make_config, make_settings


def make_agent_settings(folder: Path) -> AgentSettings:
    settings = agent_settings(make_config(folder), make_settings(folder), "node0", "127.0.0.1")
    return replace(settings, shared_memory_dir=str(folder / "memory"), spill_dir=str(folder / "disk"))


def test_engines_logs_lie_on_disk_and_state_in_memory(tmp_path: Path) -> None:
    agent = NodeAgent(make_agent_settings(tmp_path), lambda *event: None, lambda row: None)
    assert agent._pool._logs.is_relative_to(tmp_path / "disk")
    assert agent._folder.is_relative_to(tmp_path / "memory")


def test_an_agent_that_was_killed_leaves_nothing_behind_in_memory_nor_on_disk(tmp_path: Path) -> None:
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name, pid in (("eadt-dead", gone.pid), ("eadt-alive", os.getpid())):
        for folder in (memory / name, disk / name):
            folder.mkdir(parents=True)
        (memory / name / "pid").write_text(str(pid))
    (disk / "eadt-elsewhere").mkdir()  # the disk may be another node's too
    agent_module._remove_leftovers(memory, disk)
    assert [path.name for path in memory.iterdir()] == ["eadt-alive"]
    assert sorted(path.name for path in disk.iterdir()) == ["eadt-alive", "eadt-elsewhere"]


def test_what_an_engine_says_reaches_the_coordinator_though_it_cannot_be_booked(tmp_path: Path) -> None:
    said: list[tuple[str, str, dict[str, Any]]] = []
    settings = make_agent_settings(tmp_path)
    agent = NodeAgent(settings, lambda *event: said.append(event), lambda row: None)
    job = TrainingJob(settings.training, {}, 0, "fp32", 1)
    agent._specs["engine-1-0"] = EngineSpec(
        "engine-1-0", 1, 0, "node0", "127.0.0.1", job, plan_batch(1, 1, 1), ComputeShare()
    )
    with pytest.raises(AssertionError):  # nothing measures: the agent was not started
        agent._engine_event("engine-1-0", "exit", {"status": 1, "log_tail": ""})
    assert said == [("engine-1-0", "exit", {"status": 1, "log_tail": ""})]
