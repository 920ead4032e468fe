"""Who else trains on this machine, and which part of its CPU work is this run's.

Owns: the registration of a run's agents (``tenant.json`` in the agent's folder in shared memory) and the CPU
time of all processes, from ``/proc``. Must not: know about power, or decide what a note says.

A *tenant* is a run that trains here: this run, every other run whose agent is registered and lives, and every
Ray worker that works for neither. Of these workers some do not count: idle ones, services of Ray's and of
EADT's (a coordinator that nobody claims works for some run, and little), those that use less than 0.05 cores,
and those first seen at work less than a minute ago, which may be hosts of this run that have not said so yet.
To a tenant belongs what its agents and its other processes (hosts, coordinator, driver) have started. The
machine's CPU and DRAM energy is split by the tenants' CPU time; the rest of the machine's work, the system's
and Ray's own, follows in the same proportion. So the parts of two runs over the same time add up to one; a
run beside tenants that did nothing at all gets an equal part.

What it cannot see. In a container with processes of its own (``can_see_machine`` false) tenants in other
containers are invisible, and the run takes itself for alone; ``foreign_fraction`` may still show them, since
``/proc/stat`` is mostly the whole machine's. The folder of another user's run cannot be read: such a run is a
tenant as long as its owner has Ray workers here, and its CPU time is theirs, which everybody may read. The
last moments of a process that nobody of its tree waited for are in no number.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from eadt.adapters.nvml import ComputeProcess
from eadt.clock import SYSTEM_CLOCK, Clock

PROC = Path("/proc")
TENANT_FILE = "tenant.json"

_TICKS_PER_SECOND = float(os.sysconf("SC_CLK_TCK")) if hasattr(os, "sysconf") else 100.0
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO in Linux' include/linux/proc_ns.h
_KERNEL_PARENT = "kthreadd"

_RAY_WORKER = "ray::"
# The kernel keeps 15 characters of a process's name.
_RAY_SERVICES = (
    "ray::IDLE", "ray::SPILL_", "ray::RESTORE_", "ray::DELETE_", "ray::DashboardA", "ray::RuntimeEnv",
    "ray::TrainContr", "ray::TrainState", "ray::Preemption", "ray::PlacementG", "ray::Synchroniz",
    "ray::JobSupervi", "ray::_StatsActo", "ray::Autoscalin", "ray::Coordinato", "ray::EnergySupe",
)  # fmt: skip
_RAY_DAEMONS = (_RAY_WORKER, "raylet", "gcs_server", "ray-dashboard")
_MPS_SERVER = "nvidia-cuda-mps"

_NOTICED_CORES = 0.05
"""A Ray worker that uses less is somebody's service actor, not a tenant."""
_NOTICED_TICKS = 3
_UNCLAIMED_S = 60.0
"""So long may a run take until it says which workers are its hosts."""
_USUAL_CORES = 0.05
"""What a system's own services use; not worth a word."""
_SHORTEST_FOREIGN_S = 1.0
_FRESH_S = 1.0
"""A process younger than this computes on no card yet: so long does a start of CUDA take."""

_Key = tuple[int, int]
"""Process number and start: numbers are used again."""

_OWN = ""


@dataclass(frozen=True, slots=True)
class OwnFraction:
    """Which part of the machine's CPU work was this run's, since the last time it was asked.

    Attributes:
        fraction: Of the cpu and dram energy, this run's part; ``None``: no other tenant, all is its own.
        tenants: The others, by name (``run demo-1a2b``, ``Ray worker Trainer``); empty without any.
        own_cpu_s: CPU seconds of this run's processes.
        foreign_fraction: Fraction of the machine's CPU time that was neither a tenant's nor the system's;
            0.0 where that is less than 0.05 cores; ``None``: unknown, or asked about less than a second.
    """

    fraction: float | None
    tenants: tuple[str, ...]
    own_cpu_s: float
    foreign_fraction: float | None


class _Registration(msgspec.Struct):
    """``tenant.json``: an agent, and what else of its run is on the machine (number and start)."""

    run_id: str
    node: str
    pid: int
    start_ticks: int
    others: list[_Key] = []


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    parent: int
    title: str
    start_ticks: int
    cpu_ticks: int
    reaped_ticks: int  # of children that have ended and were waited for, with theirs

    @property
    def key(self) -> _Key:
        return self.pid, self.start_ticks

    @property
    def total_ticks(self) -> int:
        return self.cpu_ticks + self.reaped_ticks


@dataclass
class _Scan:
    """All processes at one moment, and whose they are (no entry: nobody's)."""

    at_s: float = 0.0
    machine_ticks: int | None = None
    processes: dict[int, _Process] = field(default_factory=dict)
    owners: dict[_Key, str] = field(default_factory=dict)
    runs: set[str] = field(default_factory=set)

    def has(self, key: _Key) -> bool:
        process = self.processes.get(key[0])
        return process is not None and process.start_ticks == key[1]


def write_tenant(folder: Path, run_id: str, node: str, proc: Path = PROC) -> None:
    """Register this process as the agent of a run on this machine: writes ``folder/tenant.json``.

    Raises:
        OSError: The folder cannot be written.
    """
    process = _read_process(proc, os.getpid())
    start_ticks = process.start_ticks if process is not None else 0
    _write(folder, _Registration(run_id, node, os.getpid(), start_ticks))


def remove_tenant(folder: Path) -> None:
    """Take the registration back. Idempotent; raises nothing."""
    with contextlib.suppress(OSError):
        (folder / TENANT_FILE).unlink(missing_ok=True)


class Tenants:
    """See the module. Thread-safe; no method raises for what it finds or does not find in ``/proc``.

    Args:
        shared_memory_dir: Where the agents of all runs have their folders.
        run_id: This run.
        own_pids: Process numbers on this machine that are this run's besides its agents and what they
            started: hosts, coordinator and all other Ray workers of its job, driver. They are written into
            this process's ``tenant.json``, if it has one, so that other runs know them too. Must not block.
        clock: Source of time.
        proc: The ``/proc`` to read.
    """

    def __init__(
        self,
        shared_memory_dir: Path,
        run_id: str,
        own_pids: Callable[[], Collection[int]],
        clock: Clock = SYSTEM_CLOCK,
        proc: Path = PROC,
    ) -> None:
        self._shared_memory_dir = shared_memory_dir
        self._run_id = run_id
        self._own_pids = own_pids
        self._clock = clock
        self._proc = proc
        self._lock = threading.Lock()
        self._base: _Scan | None = None
        self._newest = _Scan(at_s=float("-inf"))
        self._unmatched: dict[_Key, int] = {}
        self._at_work_since_s: dict[_Key, float] = {}

    @property
    def can_see_machine(self) -> bool:
        """Whether all processes of the machine are visible, not only this container's or this user's."""
        try:
            namespace = os.readlink(self._proc / "self" / "ns" / "pid")
        except OSError:
            return False
        return namespace == _INITIAL_PID_NAMESPACE and _read_process(self._proc, 1) is not None

    def start(self) -> None:
        """Count from now on."""
        with self._lock:
            self._base = self._scan()

    def own_fraction(self) -> OwnFraction:
        """This run's part since the last call, or since :meth:`start`. Takes a few ms."""
        with self._lock:
            scan = self._scan()
            before = self._base if self._base is not None else scan
            self._base = scan
            ticks = self._gained(before, scan)
            return self._split(before, scan, ticks)

    def own_tree(self) -> frozenset[int]:
        """Numbers of this run's processes on this machine, now."""
        with self._lock:
            return self._own(self._scan())

    def cpu_seconds_of(self, pids: Collection[int]) -> dict[int, float]:
        """CPU seconds since their start, each with all that it started; one that has ended is missing."""
        with self._lock:
            processes = self._scan().processes
        children: dict[int, list[int]] = defaultdict(list)
        for process in processes.values():
            children[process.parent].append(process.pid)
        seconds: dict[int, float] = {}
        for pid in pids:
            if pid in processes:
                tree = [pid]
                for member in tree:  # grows while it is walked
                    tree.extend(children[member])
                seconds[pid] = sum(processes[member].total_ticks for member in tree) / _TICKS_PER_SECOND
        return seconds

    def foreign_on_card(self, processes: Collection[ComputeProcess], num_own: int) -> int:
        """How many of a card's processes are not this run's; see :func:`foreign_on_card`."""
        with self._lock:
            scan = self._newest
            age_s = self._clock.monotonic_s() - scan.at_s
            if age_s > _FRESH_S and not all(process.pid in scan.processes for process in processes):
                scan = self._scan()
            titles = {process.pid: process.title for process in scan.processes.values()}
            own = self._own(scan)
        return foreign_on_card(processes, own, titles, num_own, can_see_machine=self.can_see_machine)

    # -- who is who ---------------------------------------------------------------------------------

    def _scan(self) -> _Scan:
        scan = _Scan(at_s=self._clock.monotonic_s(), machine_ticks=_machine_ticks(self._proc))
        scan.processes = {process.pid: process for process in _all_processes(self._proc)}
        if self._base is not None:
            _drop_reaped(self._proc, self._base, scan)
        self._set_owners(scan)
        self._newest = scan
        return scan

    def _set_owners(self, scan: _Scan) -> None:
        roots = self._roots(scan)
        known = self._base.owners if self._base is not None else {}
        found: dict[int, str | None] = {}
        for start in scan.processes.values():
            # From the process up to the first whose owner is known, and back down.
            path: list[_Process] = []
            process: _Process | None = start
            owner: str | None = None
            while process is not None:
                if process.pid in found:
                    owner = found[process.pid]
                    break
                path.append(process)
                found[process.pid] = None  # against a circle of parents, read while numbers were reused
                owner = roots.get(process.pid)
                if owner is not None:
                    break
                process = scan.processes.get(process.parent)
            for process in reversed(path):
                if owner is None and not process.title.startswith(_RAY_WORKER):
                    owner = known.get(process.key)  # its parent has ended, but it is still theirs
                found[process.pid] = owner
                if owner is not None:
                    scan.owners[process.key] = owner

    def _roots(self, scan: _Scan) -> dict[int, str]:
        """Processes that belong to a tenant whoever started them."""
        own = {pid for pid in self._own_pids() if pid in scan.processes}
        roots: dict[int, str] = {}
        hidden: dict[int, list[str]] = defaultdict(list)
        for folder, registration in _registrations(self._shared_memory_dir):
            if registration is None:
                with contextlib.suppress(OSError):
                    hidden[folder.stat().st_uid].append(_run_of(folder))
                continue
            if not scan.has((registration.pid, registration.start_ticks)):
                continue  # left behind by an agent that was killed
            if registration.run_id == self._run_id:
                owner = _OWN
                if registration.pid == os.getpid():
                    self._publish(folder, registration, [scan.processes[pid].key for pid in sorted(own)])
            else:
                owner = f"run {registration.run_id}"
                scan.runs.add(owner)
            for key in ((registration.pid, registration.start_ticks), *registration.others):
                if scan.has(key):
                    roots[key[0]] = owner
        roots |= dict.fromkeys(own, _OWN)
        for process in self._unclaimed_workers(scan, roots):
            roots[process.pid] = f"Ray worker {_ray_name(self._proc, process)}"
            if hidden:
                with contextlib.suppress(OSError):
                    uid = (self._proc / str(process.pid)).stat().st_uid
                    scan.runs.update(f"run {run}" for run in hidden[uid])
        return roots

    def _unclaimed_workers(self, scan: _Scan, claimed: Collection[int]) -> list[_Process]:
        """Ray workers that have been at work for a while and that no run has claimed."""
        workers = [
            process
            for process in scan.processes.values()
            if process.title.startswith(_RAY_WORKER) and not process.title.startswith(_RAY_SERVICES)
        ]
        for process in workers:
            self._at_work_since_s.setdefault(process.key, scan.at_s)
        self._at_work_since_s = {k: since_s for k, since_s in self._at_work_since_s.items() if scan.has(k)}
        latest_s = scan.at_s - _UNCLAIMED_S
        return [
            process
            for process in workers
            if process.pid not in claimed and self._at_work_since_s[process.key] <= latest_s
        ]

    def _publish(self, folder: Path, registration: _Registration, others: list[_Key]) -> None:
        if others != registration.others:
            registration.others = others
            with contextlib.suppress(OSError):  # others then see the hosts as a Ray worker of nobody's
                _write(folder, registration)

    @staticmethod
    def _own(scan: _Scan) -> frozenset[int]:
        return frozenset(key[0] for key, owner in scan.owners.items() if owner == _OWN)

    # -- CPU time -----------------------------------------------------------------------------------

    def _gained(self, before: _Scan, now: _Scan) -> dict[str | None, int]:
        """Ticks since ``before`` by owner; ``None``: the system's and Ray's own; nobody else's are in it.

        What a process has used is in its own counter while it lives, and in its parent's after the parent
        has waited for it: of what a parent got from children, that which was counted before is taken off.
        """
        counted: dict[_Key, int] = defaultdict(int)
        for process in before.processes.values():
            if not now.has(process.key):
                heir = _heir(process, before, now)
                if heir is not None:
                    counted[heir] += process.total_ticks
        unmatched: dict[_Key, int] = {}
        ticks: dict[str | None, int] = defaultdict(int)
        for process in now.processes.values():
            old = before.processes.get(process.pid) if before.has(process.key) else None
            used = process.cpu_ticks - (old.cpu_ticks if old is not None else 0)
            reaped = process.reaped_ticks - (old.reaped_ticks if old is not None else 0)
            fresh = counted.get(process.key, 0)
            # A child may end between the looks at its parent and at itself: its time comes a scan later.
            known = fresh + self._unmatched.get(process.key, 0)
            if fresh and known > reaped:
                unmatched[process.key] = min(fresh, known - reaped)
            gained = max(0, used) + max(0, reaped - known)
            owner = now.owners.get(process.key, before.owners.get(process.key))
            if owner is not None or _is_system(process, now):
                ticks[owner] += gained
        self._unmatched = unmatched
        return ticks

    def _split(self, before: _Scan, now: _Scan, ticks: Mapping[str | None, int]) -> OwnFraction:
        elapsed_s = now.at_s - before.at_s
        noticed = max(_NOTICED_TICKS, _NOTICED_CORES * elapsed_s * _TICKS_PER_SECOND)
        others = {
            owner: gained
            for owner, gained in ticks.items()
            if owner not in (None, _OWN) and (owner.startswith("run ") or gained >= noticed)
        }
        own = ticks.get(_OWN, 0)
        names = tuple(sorted({str(name) for name in others} | now.runs))
        fraction: float | None = None
        if names:
            everything = own + sum(others.values())
            # Without any work: equal parts of all runs; Ray workers are one where there is no other run.
            fraction = own / everything if everything else 1 / (1 + max(1, len(now.runs)))
        return OwnFraction(
            fraction=fraction,
            tenants=names,
            own_cpu_s=own / _TICKS_PER_SECOND,
            foreign_fraction=_foreign_fraction(before, now, sum(ticks.values()), elapsed_s),
        )


def foreign_on_card(
    processes: Collection[ComputeProcess],
    own_pids: Collection[int],
    titles: Mapping[int, str],
    num_own: int,
    *,
    can_see_machine: bool,
) -> int:
    """How many of a card's compute processes are not this run's. The server of MPS is nobody's.

    In a container the driver may give the machine's process numbers, which mean nothing there: where none of
    them is this run's and not all of the machine can be seen, only the count is compared.

    Args:
        processes: What the driver says is on the card.
        own_pids: All processes of this run.
        titles: Names of all visible processes, by number.
        num_own: Processes that this run has on the card (a server of MPS that it sees as one included).
        can_see_machine: See :class:`Tenants`.
    """
    strangers = [process.pid for process in processes if process.pid not in own_pids]
    if can_see_machine or len(strangers) < len(processes):
        return sum(not titles.get(pid, "").startswith(_MPS_SERVER) for pid in strangers)
    return max(0, len(processes) - num_own)


def _foreign_fraction(before: _Scan, now: _Scan, ticks: int, elapsed_s: float) -> float | None:
    if now.machine_ticks is None or before.machine_ticks is None or elapsed_s < _SHORTEST_FOREIGN_S:
        return None
    machine = now.machine_ticks - before.machine_ticks
    if machine <= 0:
        return None
    foreign = machine - ticks
    return 0.0 if foreign < _USUAL_CORES * elapsed_s * _TICKS_PER_SECOND else min(1.0, foreign / machine)


def _is_system(process: _Process, scan: _Scan) -> bool:
    parent = scan.processes.get(process.parent)
    is_kernel_thread = parent is not None and (parent.title, parent.parent) == (_KERNEL_PARENT, 0)
    return is_kernel_thread or process.title.startswith(_RAY_DAEMONS)


def _heir(process: _Process, before: _Scan, now: _Scan) -> _Key | None:
    """The nearest ancestor that lives on of a process that has ended."""
    passed: set[int] = set()
    ancestor: _Process | None = process
    while ancestor is not None and ancestor.pid not in passed:
        if now.has(ancestor.key):
            return ancestor.key
        passed.add(ancestor.pid)
        ancestor = before.processes.get(ancestor.parent)
    return None


def _drop_reaped(proc: Path, before: _Scan, now: _Scan) -> None:
    """Drop children that ended between the looks at themselves and at their parent.

    Their time is in the parent's counter already, and would be counted twice.
    """
    parents = {
        pid
        for pid, process in now.processes.items()
        if before.has(process.key) and process.reaped_ticks > before.processes[pid].reaped_ticks
    }
    if parents:
        for process in list(now.processes.values()):
            if process.parent in parents:
                again = _read_process(proc, process.pid)
                if again is None or again.key != process.key:
                    del now.processes[process.pid]


def _registrations(shared_memory_dir: Path) -> Iterator[tuple[Path, _Registration | None]]:
    """Registrations of all agents; ``None``: a folder that this user may not read."""
    for folder in shared_memory_dir.glob("eadt-*"):
        try:
            yield folder, msgspec.json.decode((folder / TENANT_FILE).read_bytes(), type=_Registration)
        except PermissionError:
            yield folder, None
        except (OSError, msgspec.MsgspecError):
            continue


def _write(folder: Path, registration: _Registration) -> None:
    draft = folder / f"{TENANT_FILE}.{os.getpid()}"
    draft.write_bytes(msgspec.json.encode(registration))
    draft.replace(folder / TENANT_FILE)


def _run_of(folder: Path) -> str:
    """The run's id in a folder's name, ``eadt-<run>-<node>``."""
    return folder.name.removeprefix("eadt-").rpartition("-")[0]


def _ray_name(proc: Path, process: _Process) -> str:
    """The actor's class or the task's name of a Ray worker, whose title is ``ray::Class.method``."""
    title = process.title
    with contextlib.suppress(OSError):
        words = (proc / str(process.pid) / "cmdline").read_bytes().replace(b"\0", b" ").split()
        if words and words[0].startswith(_RAY_WORKER.encode()):
            title = words[0].decode(errors="replace")
    return title.removeprefix(_RAY_WORKER).split("(")[0].split(".")[0]


def _machine_ticks(proc: Path) -> int | None:
    """Ticks in which a core worked for a process: user, nice and system; not for interrupts."""
    try:
        with (proc / "stat").open("rb") as file:
            fields = file.readline().split()
        return sum(map(int, fields[1:4])) or None
    except (OSError, ValueError):
        return None


def _all_processes(proc: Path) -> Iterator[_Process]:
    try:
        names = os.listdir(proc)
    except OSError:
        return
    for name in names:
        if name.isdecimal():
            process = _read_process(proc, int(name))
            if process is not None:
                yield process


def _read_process(proc: Path, pid: int) -> _Process | None:
    """One process from its ``stat`` (man 5 proc_pid_stat); ``None`` when it has ended."""
    try:
        descriptor = os.open(f"{proc}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(descriptor, 1024)
        finally:
            os.close(descriptor)
        begin, end = text.index(b"("), text.rindex(b")")  # the name may hold both
        fields = text[end + 2 :].split()
        return _Process(
            pid=pid,
            parent=int(fields[1]),
            title=text[begin + 1 : end].decode(errors="replace"),
            start_ticks=int(fields[19]),
            cpu_ticks=int(fields[11]) + int(fields[12]),
            reaped_ticks=int(fields[13]) + int(fields[14]),
        )
    except (OSError, ValueError, IndexError):
        return None
