"""How busy this machine's cores are, how many of them we may use, and which machine it is.

Owns: the readings of ``/proc/stat`` and of the cgroup limits. Must not: know about power.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from eadt.errors import DeviceUnsupportedError

PROC_STAT = Path("/proc/stat")
PROC_SELF_CGROUP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

# Fields of the "cpu" line (man 5 proc_stat) in which a core works for this machine: user, nice, system,
# irq, softirq. Not idle and iowait; not steal, which is another machine's work; guest is inside user.
_BUSY_FIELDS = (1, 2, 3, 6, 7)


class CpuTimes:
    """Core-seconds of work of the whole machine, from ``/proc/stat``.

    In a container ``/proc/stat`` is (unless lxcfs replaces it) that of the whole machine: the work of
    others on it is counted too, and a cgroup's limit of cores plays no part.

    Args:
        proc_stat: The file, kept open from the first reading on; where there is none, ``psutil`` is
            asked.
    """

    def __init__(self, proc_stat: Path = PROC_STAT) -> None:
        self._proc_stat = proc_stat
        self._file_descriptor: int | None = None
        self._ticks_per_second = float(os.sysconf("SC_CLK_TCK")) if hasattr(os, "sysconf") else 100.0

    def busy_core_seconds(self) -> float:
        """Core-seconds spent working since the machine started, in steps of one tick (10 ms).

        Does not block. Not thread-safe.

        Raises:
            DeviceUnsupportedError: The machine counts no CPU time (some sandboxes answer only zeros).
        """
        if self._file_descriptor is None and not self._proc_stat.exists():
            times = psutil.cpu_times()
            busy_s = times.user + times.system + getattr(times, "nice", 0.0)
        else:
            if self._file_descriptor is None:
                self._file_descriptor = os.open(self._proc_stat, os.O_RDONLY | os.O_CLOEXEC)
            # The first line is all that is needed; its ten numbers never take 256 characters.
            fields = os.pread(self._file_descriptor, 256, 0).split(b"\n", 1)[0].split()
            if len(fields) < 8 or fields[0] != b"cpu":
                raise self._no_times("has no line of CPU times")
            busy_s = sum(int(fields[position]) for position in _BUSY_FIELDS) / self._ticks_per_second
        if busy_s <= 0.0:
            raise self._no_times("counts no CPU time")
        return busy_s

    def close(self) -> None:
        """Close the file; a later reading opens it again."""
        if self._file_descriptor is not None:
            os.close(self._file_descriptor)
            self._file_descriptor = None

    def _no_times(self, what: str) -> DeviceUnsupportedError:
        return DeviceUnsupportedError(
            f"{self._proc_stat} {what}",
            code="EADT-342",
            means="The CPU's power cannot be estimated on this machine.",
            fix="Run outside the sandbox, or on a machine with readable RAPL counters.",
        )


def num_cores() -> int:
    """Logical cores of the machine."""
    return os.cpu_count() or 1


def cgroup_core_limit(cgroup_root: Path = CGROUP_ROOT, proc_cgroup: Path = PROC_SELF_CGROUP) -> float | None:
    """Cores' worth of CPU time that this process's cgroup allows; ``None`` when unlimited or unknown."""
    limits: list[float] = []
    for folder in _cgroup_folders("cpu", cgroup_root, proc_cgroup):
        words = _words(folder / "cpu.max")
        if len(words) == 2 and words[0] != "max":
            limits.append(float(words[0]) / float(words[1]))
        quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
        if quota and period and float(quota[0]) > 0:
            limits.append(float(quota[0]) / float(period[0]))
    return min(limits, default=None)


def cgroup_memory_limit_bytes(
    cgroup_root: Path = CGROUP_ROOT, proc_cgroup: Path = PROC_SELF_CGROUP
) -> int | None:
    """Memory that this process's cgroup allows; ``None`` when unlimited or unknown."""
    limits: list[int] = []
    for folder in _cgroup_folders("memory", cgroup_root, proc_cgroup):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _words(folder / name)
            # Version 1 says "unlimited" as a number near 2**63.
            if words and words[0] != "max" and int(words[0]) < 1 << 60:
                limits.append(int(words[0]))
    return min(limits, default=None)


def usable_cores() -> float:
    """Cores that this process may use: the machine's, its affinity and its cgroup's, whichever is least."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else num_cores()
    limit = cgroup_core_limit()
    return float(affinity) if limit is None else min(float(affinity), limit)


def machine_id() -> str | None:
    """Same for all processes, containers and Ray nodes on one booted machine; ``None`` when unknown.

    Two Ray nodes on one machine see the same CPU counters: only one of them may book them.
    """
    words = _words(BOOT_ID)
    return words[0] if words else None


def _cgroup_folders(controller: str, cgroup_root: Path, proc_cgroup: Path) -> list[Path]:
    """The process's own cgroup and its parents, for version 2 and for one controller of version 1."""
    folders: list[Path] = []
    try:
        lines = proc_cgroup.read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            root = cgroup_root
        elif controller in controllers.split(","):
            root = cgroup_root / controller
        else:
            continue
        folder = root / path.lstrip("/")
        while folder != root and root in folder.parents:
            folders.append(folder)
            folder = folder.parent
        folders.append(root)
    return folders


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
