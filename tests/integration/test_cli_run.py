"""``eadt run`` as users call it: a process of its own that starts a local Ray cluster.

Real: the program, Ray, the node agent, the engines, the ledger, the report. Fake: nothing. The training code
is the example of the README, so this test also keeps that example working.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 180


def command(run_folder: Path, *settings: str) -> list[str]:
    options = [f"run.folder={run_folder}", "policy.type=hold", "policy.schedule=[]", *settings]
    arguments = [argument for option in options for argument in ("--set", option)]
    code = "from eadt.cli import main; main()"
    return [sys.executable, "-c", code, "run", "examples/own_loop.yaml", "-o", "json", *arguments]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def test_the_example_trains_and_its_report_adds_up(tmp_path: Path) -> None:
    result = subprocess.run(
        command(tmp_path / "run", "training.max_steps=150"),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    document = json.loads(result.stdout)  # Ray and its workers printed nothing there
    report = document["report"]
    assert document["status"] == "completed"
    assert report["optimizer_steps"] == 150
    assert report["samples"] == 150 * 64
    assert report["loss"]["last"] < 0.8 * report["loss"]["first"]
    energy = report["energy_j"]
    parts = [part["value"] for part in energy["by_use"].values() if part]
    assert sum(parts) == pytest.approx(energy["total"]["value"], abs=1e-6)
    assert Path(document["report_paths"]["html"]).is_file()


def test_ctrl_c_ends_a_run_with_130_and_the_same_command_goes_on(tmp_path: Path) -> None:
    running = subprocess.Popen(
        command(tmp_path / "run", "training.max_steps=100000"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    try:
        for line in running.stderr:
            if "] step " in line:  # it is training
                running.send_signal(signal.SIGINT)
                break
        stdout, stderr = running.communicate(timeout=TIMEOUT_S)
    finally:
        running.kill()
    assert running.returncode == 130, stderr[-3000:]
    interrupted = json.loads(stdout)
    done = interrupted["report"]["optimizer_steps"]
    assert interrupted["status"] == "interrupted"
    assert interrupted["report"]["partial"] is True
    assert done >= 1

    resumed = subprocess.run(
        command(tmp_path / "run", f"training.max_steps={done + 20}"),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    report = json.loads(resumed.stdout)["report"]
    assert report["optimizer_steps"] == done + 20
    assert report["lost_steps"] == 0
    assert report["run"]["num_sessions"] == 2
