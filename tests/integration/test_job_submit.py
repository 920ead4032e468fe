"""``ray job submit -- eadt run`` on a cluster that asks for a token, as users do it.

Real: a Ray head with its dashboard and token authentication, the job, its upload of this folder, the engines
that import the user's training loop from it. Fake: nothing.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from eadt.clock import monotonic_s
from eadt.record.ledger import read_ledger
from eadt.record.rows import CheckpointRow, StepsRow

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_LIMIT_S = 120
JOB_LIMIT_S = 240


@dataclass(frozen=True)
class Head:
    """A Ray cluster of one node, with what it takes to reach it: a token."""

    address: str
    dashboard: str
    env: dict[str, str]

    def call(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A command of this environment, as a user of that cluster calls it.

        Ray's own commands want ``RAY_AUTH_MODE`` too; ours do with the token.
        """
        if arguments[0] == "ray":
            env = {"RAY_AUTH_MODE": "token", **env}
        return subprocess.run(
            [BIN / arguments[0], *arguments[1:]],
            cwd=ROOT,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=JOB_LIMIT_S,
        )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="eadt-job-"))  # short: Ray puts sockets below it
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    port, dashboard_port = free_port(), free_port()
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    log = (folder / "head.log").open("wb")
    process = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard_port}",
         "--num-cpus=2", "--object-store-memory=100000000", f"--temp-dir={folder}", "--disable-usage-stats"],
        cwd=folder, env={**env, "RAY_AUTH_MODE": "token"}, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    head = Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}", env)
    try:
        deadline_s = monotonic_s() + START_LIMIT_S
        # The dashboard answers some seconds before it can place a job.
        trial = ("ray", "job", "submit", "--address", head.dashboard, "--no-wait", "--", "true")
        while (tried := head.call(*trial)).returncode != 0:
            assert process.poll() is None, (folder / "head.log").read_text()
            assert monotonic_s() < deadline_s, tried.stderr
            threading.Event().wait(1.0)
        yield head
    finally:
        # `ray stop` would end every Ray cluster on this machine: other tests' too.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        subprocess.run(["pkill", "-KILL", "-f", str(folder)], check=False)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_job_trains_with_the_uploaded_loop_and_leaves_its_report(
    head: Head, tmp_path: Path
) -> None:
    options = [f"run.folder={tmp_path / 'run'}", "run.name=submitted", "training.max_steps=60"]
    submitted = head.call(
        "ray", "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--",
        "eadt", "run", "examples/own_loop.yaml", *(part for option in options for part in ("--set", option)),
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout[-4000:] + submitted.stderr[-2000:]
    assert "succeeded" in submitted.stdout
    assert "step 60" in submitted.stdout, "the job's log shows no progress"
    reported = head.call("eadt", "report", str(tmp_path / "run"), "-o", "json")
    assert reported.returncode == 0, reported.stderr
    report = json.loads(reported.stdout)
    assert report["run"]["status"] == "completed"
    assert report["optimizer_steps"] == 60
    assert sum(part["value"] for part in report["energy_j"]["by_use"].values() if part) == pytest.approx(
        report["energy_j"]["total"]["value"], rel=0.01
    )


def test_a_stopped_job_leaves_a_checkpoint_and_a_partial_report(head: Head, tmp_path: Path) -> None:
    run = tmp_path / "run"
    patience = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}  # Ray kills after 3 s otherwise
    submitted = head.call(
        "ray", "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--no-wait",
        "--submission-id", "stopped", "--runtime-env-json", json.dumps(patience), "--",
        "eadt", "run", "examples/own_loop.yaml", "--set", f"run.folder={run}",
        "--set", "training.max_steps=100000",
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    deadline_s = monotonic_s() + JOB_LIMIT_S
    while not any(isinstance(row, StepsRow) for row in read_ledger(run / "ledger").rows):
        assert monotonic_s() < deadline_s, "the job takes no step"
        threading.Event().wait(0.5)
    asked = head.call("eadt", "status", "-o", "json", RAY_ADDRESS=head.address)
    assert asked.returncode == 0, asked.stderr
    status = json.loads(asked.stdout)
    assert (status["source"], status["status"], status["run"]) == ("supervisor", "training", "own_loop")
    stopped = head.call("ray", "job", "stop", "stopped", "--address", head.dashboard)
    assert stopped.returncode == 0, stopped.stderr
    assert "was stopped" in stopped.stdout + stopped.stderr
    report = json.loads((run / "report.json").read_text())
    assert report["run"]["status"] == "interrupted"
    assert report["partial"] is True
    [checkpoint] = [row for row in read_ledger(run / "ledger").rows if isinstance(row, CheckpointRow)]
    assert checkpoint.step == report["optimizer_steps"] >= 1


def test_a_wrong_token_is_said_before_anything_starts(head: Head, tmp_path: Path) -> None:
    token = tmp_path / "wrong"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    run = tmp_path / "run"
    refused = head.call(
        "eadt", "run", "examples/own_loop.yaml", "--set", f"run.folder={run}",
        RAY_ADDRESS=head.address, RAY_AUTH_TOKEN_PATH=str(token),
    )  # fmt: skip
    assert refused.returncode == 3
    assert "EADT-301" in refused.stderr
    assert "token" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (run / "ledger").exists()
