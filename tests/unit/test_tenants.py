"""Who trains on a machine and whose CPU time is whose: on real processes, and on a pretended /proc."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eadt.adapters.nvml import ComputeProcess
from eadt.node import tenants
from eadt.node.tenants import OwnFraction, Tenants, foreign_on_card, remove_tenant, write_tenant
from eadt.testing.clock import FakeClock

TICKS = os.sysconf("SC_CLK_TCK")
ME = os.getpid()


class Machine:
    """A folder that looks like /proc, and one for the agents of runs."""

    def __init__(self, root: Path, clock: FakeClock) -> None:
        self.proc = root / "proc"
        self.shared_memory = root / "shm"
        self.shared_memory.mkdir()
        (self.proc / "self" / "ns").mkdir(parents=True)
        (self.proc / "self" / "ns" / "pid").symlink_to("pid:[4026531836]")
        self.clock = clock
        self.set(1, 0, title="init")
        self.set_machine(0.0)

    def set(
        self,
        pid: int,
        parent: int,
        cpu_s: float = 0.0,
        reaped_s: float = 0.0,
        *,
        title: str = "python",
        start: int = 100,
        command: str = "",
    ) -> None:
        folder = self.proc / str(pid)
        folder.mkdir(exist_ok=True)
        ticks = (
            f"{round(cpu_s * TICKS) - 1} 1 {round(reaped_s * TICKS)} 0"
            if cpu_s
            else f"0 0 {round(reaped_s * TICKS)} 0"
        )
        (folder / "stat").write_text(
            f"{pid} ({title}) S {parent} 1 1 0 -1 4194560 9 9 9 9 {ticks} 20 0 1 0 {start} 9 9\n"
        )
        (folder / "cmdline").write_text(command or f"{title}\0")

    def remove(self, *pids: int) -> None:
        for pid in pids:
            shutil.rmtree(self.proc / str(pid))

    def set_machine(self, busy_s: float, irq_s: float = 0.0) -> None:
        ticks = round(busy_s * TICKS)
        (self.proc / "stat").write_text(f"cpu  {ticks} 0 0 999 999 {round(irq_s * TICKS)} 0 0 0 0\ncpu0 1\n")

    def register(self, run_id: str, pid: int, start: int = 100, node: str = "0123456789ab") -> Path:
        folder = self.shared_memory / f"eadt-{run_id}-{node}"
        folder.mkdir(exist_ok=True)
        values = {"run_id": run_id, "node": node, "pid": pid, "start_ticks": start, "others": []}
        (folder / "tenant.json").write_text(json.dumps(values))
        return folder

    def tenants(self, run_id: str = "a", own_pids: tuple[int, ...] = ()) -> Tenants:
        seen = Tenants(self.shared_memory, run_id, lambda: own_pids, self.clock, self.proc)
        seen.start()
        return seen


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, FakeClock())


@pytest.fixture
def two_runs(machine: Machine) -> Machine:
    """Runs a (agent 10) and b (agent 20), each with a fork server and an engine."""
    for agent in (10, 20):
        machine.set(agent, 1, 5.0)
        machine.set(agent + 1, agent, 1.0)
        machine.set(agent + 2, agent + 1, 1.0)
    machine.register("a", 10)
    machine.register("b", 20)
    return machine


class TestShare:
    def test_alone_all_is_its_own(self, machine):
        machine.set(10, 1, 5.0)
        machine.register("a", 10)
        seen = machine.tenants()
        machine.set(10, 1, 8.0)
        assert seen.own_fraction() == OwnFraction(None, (), 3.0, None)

    def test_by_the_cpu_time_of_whole_trees(self, two_runs):
        ours, theirs = two_runs.tenants("a"), two_runs.tenants("b")
        two_runs.set(12, 11, 3.5)  # 2.5 s
        two_runs.set(10, 1, 5.5)  # 0.5 s
        two_runs.set(22, 21, 1.75)
        two_runs.set(23, 22, 0.25)  # began since
        assert ours.own_fraction() == OwnFraction(0.75, ("run b",), 3.0, None)
        assert theirs.own_fraction() == OwnFraction(0.25, ("run a",), 1.0, None)

    def test_each_call_begins_a_new_time(self, two_runs):
        ours = two_runs.tenants()
        two_runs.set(12, 11, 2.0)
        assert ours.own_fraction().fraction == 1.0
        two_runs.set(22, 21, 2.0)
        assert ours.own_fraction().fraction == 0.0

    def test_beside_a_tenant_that_did_nothing_too_parts_are_equal(self, two_runs):
        two_runs.set(30, 1)
        two_runs.register("c", 30)
        assert two_runs.tenants().own_fraction().fraction == pytest.approx(1 / 3)

    def test_agents_of_one_run_on_several_ray_nodes_of_the_machine(self, two_runs):
        two_runs.set(30, 1)
        two_runs.register("a", 30, node="other")
        ours = two_runs.tenants()
        two_runs.set(30, 1, 1.0)
        two_runs.set(20, 1, 6.0)
        assert ours.own_fraction() == OwnFraction(0.5, ("run b",), 1.0, None)

    def test_hosts_are_told_to_the_other_run(self, two_runs):
        two_runs.set(ME, 1)
        two_runs.register("a", ME)
        two_runs.set(50, 1, title="python")  # a's driver, which nothing shows to be anybody's
        ours = two_runs.tenants("a", own_pids=(50, 999_999))
        theirs = two_runs.tenants("b")
        two_runs.set(50, 1, 3.0)
        two_runs.set(20, 1, 6.0)
        assert ours.own_fraction().fraction == pytest.approx(0.75)
        assert theirs.own_fraction().fraction == pytest.approx(0.25)
        two_runs.set(50, 1, 9.0, start=500)  # somebody else's, under a number of a's
        assert theirs.own_fraction().own_cpu_s == 0.0
        assert 50 not in {key[0] for key, owner in theirs._newest.owners.items() if owner}

    def test_what_a_run_left_behind_is_no_tenant(self, machine):
        machine.set(20, 1, 5.0, start=777)
        machine.register("gone", 21)
        machine.register("number-used-again", 20, start=100)
        (machine.register("torn", 20, start=777) / "tenant.json").write_text('{"run_id": 3')
        (machine.shared_memory / "eadt-empty-0").mkdir()
        (machine.shared_memory / "eadt-file").touch()
        assert machine.tenants().own_fraction() == OwnFraction(None, (), 0.0, None)

    def test_the_run_of_another_user_is_known_by_its_ray_workers(self, machine, monkeypatch):
        folder = machine.register("hidden-run", 60)
        real = Path.read_bytes
        refused = []

        def refuse(path):
            if path.parent == folder:
                refused.append(path)
                raise PermissionError(13, "Permission denied")
            return real(path)

        monkeypatch.setattr(Path, "read_bytes", refuse)
        machine.set(10, 1)
        machine.register("a", 10)
        ours = machine.tenants()
        assert ours.own_fraction().tenants == ()  # may be a leftover
        assert refused
        machine.set(60, 1, title="ray::NodeAgent")
        ours.own_fraction()
        machine.clock.advance(60.0)
        ours.own_fraction()
        machine.set(60, 1, 3.0, title="ray::NodeAgent")
        machine.set(10, 1, 1.0)
        answer = ours.own_fraction()
        assert answer.fraction == pytest.approx(0.25)
        assert answer.tenants == ("Ray worker NodeAgent", "run hidden-run")


class TestRayWorkers:
    def test_other_jobs_are_tenants_but_not_idle_ones_and_services(self, machine):
        machine.set(5, 1, title="raylet")
        titles = {
            10: "ray::NodeAgent", 11: "ray::RayTrainWor", 30: "ray::IDLE", 31: "ray::DashboardA",
            32: "ray::RuntimeEnv", 33: "ray::SPILL_Spil", 34: "ray::IDLE_Spill", 35: "ray::TrainContr",
            36: "ray::Coordinato",
        }  # fmt: skip
        for pid, title in titles.items():
            machine.set(pid, 5, title=title)
        machine.register("a", 10)
        ours = machine.tenants("a", own_pids=(11,))
        machine.clock.advance(100.0)
        for pid, title in titles.items():
            machine.set(pid, 5, 10.0, title=title)
        assert ours.own_fraction() == OwnFraction(None, (), 20.0, None)
        machine.set(40, 5, 2.0, title="ray::LongNamedT", command="ray::LongNamedTrainer.fit  ")
        assert ours.own_fraction() == OwnFraction(None, (), 0.0, None)  # could yet be a host of ours
        machine.clock.advance(60.0)
        machine.set(40, 5, 4.0, title="ray::LongNamedT", command="ray::LongNamedTrainer.fit  ")
        machine.set(41, 40, 4.0)
        machine.set(11, 5, 12.0, title="ray::RayTrainWor")
        assert ours.own_fraction() == OwnFraction(0.25, ("Ray worker LongNamedTrainer",), 2.0, None)

    def test_one_that_hardly_works_is_none(self, machine):
        machine.set(10, 1)
        machine.set(40, 1, 1.0, title="ray::Controller")
        machine.register("a", 10)
        ours = machine.tenants()
        machine.clock.advance(60.0)
        ours.own_fraction()
        machine.clock.advance(10.0)
        machine.set(10, 1, 1.0)
        machine.set(40, 1, 1.4, title="ray::Controller")
        assert ours.own_fraction().tenants == ()
        machine.clock.advance(10.0)
        machine.set(40, 1, 2.0, title="ray::Controller")
        assert ours.own_fraction().tenants == ("Ray worker Controller",)

    def test_a_worker_that_has_just_become_idle_was_at_work(self, machine):
        machine.set(10, 1)
        machine.set(40, 1, title="ray::task")
        machine.register("a", 10)
        ours = machine.tenants()
        machine.clock.advance(60.0)
        ours.own_fraction()
        machine.set(10, 1, 1.0)
        machine.set(40, 1, 1.0, title="ray::IDLE")
        assert ours.own_fraction().fraction == 0.5
        machine.set(10, 1, 2.0)
        machine.set(40, 1, 2.0, title="ray::IDLE")
        assert ours.own_fraction().fraction is None

    def test_a_foreign_worker_below_our_own_cluster_is_foreign(self, machine):
        machine.set(10, 1)  # the driver, which started the cluster
        machine.set(11, 10, title="raylet")
        machine.set(12, 11, title="ray::Other")
        ours = machine.tenants("a", own_pids=(10,))
        machine.clock.advance(60.0)
        ours.own_fraction()
        machine.set(10, 1, 1.0)
        machine.set(12, 11, 3.0, title="ray::Other")
        assert ours.own_fraction().fraction == 0.25


class TestProcessesThatComeAndGo:
    def test_a_child_that_was_waited_for_is_counted_once_and_to_its_end(self, two_runs):
        ours = two_runs.tenants()
        two_runs.set(12, 11, 3.0)
        assert ours.own_fraction().own_cpu_s == 2.0
        two_runs.remove(12)
        two_runs.set(11, 10, 1.0, reaped_s=3.5)
        assert ours.own_fraction().own_cpu_s == 0.5
        assert ours.own_fraction().own_cpu_s == 0.0

    def test_one_that_came_and_went_unseen_too(self, two_runs):
        ours = two_runs.tenants()
        two_runs.set(11, 10, 1.0, reaped_s=0.75)
        assert ours.own_fraction().own_cpu_s == 0.75

    def test_a_whole_branch_that_ends(self, two_runs):
        ours = two_runs.tenants()
        two_runs.remove(11, 12)  # 11 waited for 12, and the agent for 11: 1 s each, and 0.25 s since
        two_runs.set(10, 1, 5.0, reaped_s=2.25)
        assert ours.own_fraction().own_cpu_s == 0.25

    def test_one_that_nobody_waited_for_takes_nothing_from_others(self, two_runs):
        ours = two_runs.tenants()
        two_runs.remove(12)
        two_runs.set(10, 1, 5.5)
        assert ours.own_fraction().own_cpu_s == 0.5

    def test_ended_between_the_looks_at_its_parent_and_at_itself(self, two_runs):
        ours = two_runs.tenants()
        two_runs.remove(12)
        assert ours.own_fraction().own_cpu_s == 0.0
        two_runs.set(11, 10, 1.0, reaped_s=1.25)
        assert ours.own_fraction().own_cpu_s == 0.25

    def test_ended_between_the_looks_at_itself_and_at_its_parent(self, two_runs, monkeypatch):
        ours = two_runs.tenants()
        two_runs.set(11, 10, 1.0, reaped_s=1.25)
        real = tenants._all_processes

        def all_but_then_it_ends(proc: Path) -> Iterator[object]:
            yield from list(real(proc))
            two_runs.remove(12)

        monkeypatch.setattr(tenants, "_all_processes", all_but_then_it_ends)
        assert ours.own_fraction().own_cpu_s == 0.25
        monkeypatch.undo()
        assert ours.own_fraction().own_cpu_s == 0.0

    def test_a_number_that_is_used_again_is_another_process(self, two_runs):
        ours = two_runs.tenants()
        two_runs.set(12, 1, 9.0, start=500)  # not ours any more
        assert ours.own_fraction().own_cpu_s == 0.0
        two_runs.set(12, 11, 0.5, start=600)
        assert ours.own_fraction().own_cpu_s == 0.5

    def test_what_the_ended_one_had_got_from_its_own_children_is_known_too(self, two_runs):
        two_runs.set(12, 11, 1.0, reaped_s=2.0)
        ours = two_runs.tenants()
        two_runs.remove(12)
        two_runs.set(11, 10, 1.0, reaped_s=3.5)
        assert ours.own_fraction().own_cpu_s == 0.5

    def test_an_orphan_stays_whose_it_was(self, two_runs):
        ours = two_runs.tenants()
        two_runs.remove(11)
        two_runs.set(12, 1, 1.5)
        two_runs.set(13, 12, 0.5)
        assert ours.own_fraction().own_cpu_s == 1.0
        two_runs.set(12, 1, 2.0)
        assert ours.own_fraction().own_cpu_s == 0.5

    def test_names_may_hold_brackets_and_blanks_and_lines_may_be_torn(self, machine):
        machine.set(10, 1, 5.0, title=") S 1 (x")
        machine.set(12, 1)
        (machine.proc / "12" / "stat").write_text("12 (x) S 1")
        machine.register("a", 10)
        ours = machine.tenants()
        machine.set(10, 1, 6.0, title=") S 1 (x")
        assert ours.own_fraction().own_cpu_s == 1.0

    def test_parents_in_a_circle_end(self, machine):
        machine.set(10, 11, 1.0)
        machine.set(11, 10, 1.0)
        seen = machine.tenants()
        assert seen.own_tree() == frozenset()
        machine.remove(10, 11)
        assert seen.own_fraction().own_cpu_s == 0.0

    def test_without_a_start_the_first_answer_begins_the_time(self, two_runs):
        ours = Tenants(two_runs.shared_memory, "a", tuple, two_runs.clock, two_runs.proc)
        assert ours.own_fraction() == OwnFraction(0.5, ("run b",), 0.0, None)
        two_runs.set(10, 1, 6.0)
        assert ours.own_fraction().own_cpu_s == 1.0


class TestForeignPrograms:
    @pytest.fixture
    def ours(self, machine) -> Tenants:
        machine.set(2, 0, title="kthreadd")
        machine.set(3, 2, title="kworker/0:1")
        machine.set(5, 1, title="raylet")
        machine.set(10, 1)
        machine.register("a", 10)
        machine.set(90, 1, title="browser")
        machine.set_machine(1000.0)
        seen = machine.tenants()
        machine.clock.advance(10.0)
        machine.set(10, 1, 6.0)
        return seen

    def test_what_no_tenant_and_no_system_used(self, machine, ours):
        machine.set(90, 1, 4.0, title="browser")
        machine.set_machine(1010.0)
        assert ours.own_fraction().foreign_fraction == pytest.approx(0.4)

    def test_the_kernel_and_ray_are_no_foreign_programs(self, machine, ours):
        machine.set(3, 2, 1.0, title="kworker/0:1")
        machine.set(5, 1, 1.5, title="raylet")
        machine.set(6, 5, 0.5, title="ray::Young")
        machine.set_machine(1010.0, irq_s=500.0)
        assert ours.own_fraction().foreign_fraction == pytest.approx(0.1)

    def test_what_every_system_uses_is_not_worth_a_word(self, machine, ours):
        machine.set_machine(1006.4)
        assert ours.own_fraction().foreign_fraction == 0.0

    def test_unknown_where_the_machine_counts_nothing_and_over_moments(self, machine, ours):
        machine.set_machine(0.0)
        assert ours.own_fraction().foreign_fraction is None
        machine.set_machine(1100.0)
        machine.clock.advance(10.0)
        assert ours.own_fraction().foreign_fraction is None
        machine.clock.advance(10.0)
        assert ours.own_fraction().foreign_fraction is None
        machine.clock.advance(0.5)
        machine.set_machine(1101.0)
        assert ours.own_fraction().foreign_fraction is None


class TestWhatIsSeen:
    def test_the_whole_machine_or_a_part(self, machine):
        assert machine.tenants().can_see_machine
        machine.remove(1)  # other users' processes are hidden
        assert not machine.tenants().can_see_machine
        machine.set(1, 0)
        (machine.proc / "self" / "ns" / "pid").unlink()
        (machine.proc / "self" / "ns" / "pid").symlink_to("pid:[4026532999]")
        assert not machine.tenants().can_see_machine

    def test_nothing_at_all(self, tmp_path):
        seen = Tenants(tmp_path / "none", "a", lambda: (1,), FakeClock(), tmp_path / "no-proc")
        assert seen.own_fraction() == OwnFraction(None, (), 0.0, None)
        assert not seen.can_see_machine
        assert seen.own_tree() == frozenset()
        assert seen.cpu_seconds_of([1]) == {}

    def test_cpu_seconds_of_trees(self, two_runs):
        seconds = two_runs.tenants().cpu_seconds_of([11, 20, 99])
        assert seconds == {11: 2.0, 20: 7.0}
        two_runs.set(12, 11, 1.0, reaped_s=0.5)
        assert two_runs.tenants().cpu_seconds_of([12]) == {12: 1.5}

    def test_own_tree(self, two_runs):
        assert two_runs.tenants().own_tree() == {10, 11, 12}


class TestCards:
    def processes(self, *pids: int) -> list[ComputeProcess]:
        return [ComputeProcess(pid, 1 << 30) for pid in pids]

    def foreign(self, *pids: int, sees: bool = True, num_own: int = 0) -> int:
        titles = {12: "python", 22: "python", 70: "nvidia-cuda-mps"}
        return foreign_on_card(self.processes(*pids), {11, 12}, titles, num_own, can_see_machine=sees)

    def test_others_are_those_that_are_not_of_our_trees(self):
        assert self.foreign(11, 12, 22) == 1
        assert self.foreign(22, 12345) == 2
        assert self.foreign(11, 70) == 0

    def test_in_a_container_numbers_mean_something_only_if_ours_are_among_them(self):
        assert self.foreign(12, 900_001, sees=False, num_own=2) == 1
        assert self.foreign(900_000, 900_001, 900_002, sees=False, num_own=2) == 1
        assert self.foreign(900_000, sees=False, num_own=2) == 0

    def test_with_what_was_seen_of_the_machine(self, two_runs):
        seen = two_runs.tenants()
        assert seen.foreign_on_card(self.processes(12, 22), num_own=1) == 1
        two_runs.set(13, 11, 0.0)  # forked since
        two_runs.clock.advance(10.0)
        assert seen.foreign_on_card(self.processes(12, 13), num_own=2) == 0


AGENT = """
import subprocess, sys
from pathlib import Path
from eadt.node.tenants import write_tenant

BURN = "import os,sys,time\\nwhile time.process_time() < {}: pass\\nprint(flush=True)\\nsys.stdin.read({})"
folder = Path(sys.argv[1])
write_tenant(folder, sys.argv[2], "node")
seconds, ends = float(sys.argv[3]), sys.argv[4] == "ends"
print(flush=True)
sys.stdin.readline()
command = [sys.executable, "-c", BURN.format(seconds, 0 if ends else 1)]
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
if ends:
    child.communicate()
print(flush=True)
sys.stdin.readline()
child.communicate() if not ends else None
"""


class TestOnRealProcesses:
    @pytest.mark.parametrize("engine", ["ends", "lives"])
    def test_two_runs_get_what_their_engines_used(self, tmp_path, engine):
        agents = {}
        for run_id, seconds in (("a", 0.9), ("b", 0.3)):
            folder = tmp_path / f"eadt-{run_id}-node"
            folder.mkdir()
            agents[run_id] = subprocess.Popen(
                [sys.executable, "-c", AGENT, str(folder), run_id, str(seconds), engine],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        try:
            for agent in agents.values():
                agent.stdout.readline()
            seen = {run_id: Tenants(tmp_path, run_id, tuple) for run_id in agents}
            for run in seen.values():
                run.start()
            for agent in agents.values():
                agent.stdin.write("\n")
                agent.stdin.flush()
            for agent in agents.values():
                agent.stdout.readline()
            trees = {run_id: seen[run_id].cpu_seconds_of([agent.pid]) for run_id, agent in agents.items()}
            answers = {run_id: run.own_fraction() for run_id, run in seen.items()}
        finally:
            for agent in agents.values():
                agent.communicate("\n")
        assert answers["a"].tenants == ("run b",)
        assert answers["b"].tenants == ("run a",)
        # The kernel cuts user and system time of each process down to whole ticks of 10 ms.
        assert 0.86 <= answers["a"].own_cpu_s < 1.5
        assert 0.26 <= answers["b"].own_cpu_s < 0.86
        whole_s = answers["a"].own_cpu_s + answers["b"].own_cpu_s
        assert answers["a"].fraction == pytest.approx(answers["a"].own_cpu_s / whole_s, abs=0.03)
        assert answers["a"].fraction + answers["b"].fraction == pytest.approx(1.0, abs=0.03)
        assert trees["a"][agents["a"].pid] >= answers["a"].own_cpu_s - 0.02
        assert {agent.returncode for agent in agents.values()} == {0}

    def test_registration(self, tmp_path):
        folder = tmp_path / "eadt-a-node"
        folder.mkdir()
        write_tenant(folder, "a", "node")
        seen = Tenants(tmp_path, "a", tuple)
        assert ME in seen.own_tree()
        remove_tenant(folder)
        remove_tenant(folder)
        assert seen.own_tree() == frozenset()
        assert list(folder.iterdir()) == []
