"""What a CPU draws when it is idle and per busy logical core, by its family: for estimates, not measurements.

Owns: the table of families, and how a machine is found in it from the text of ``/proc/cpuinfo``. Must not:
read anything.

Where the figures come from. Of each family the table has one large, common member: the power of one socket at
full load and its logical cores (threads). For servers that power is about the thermal design power (TDP) of
the maker's specification; for desktops and laptops the limit up to which they may boost for long, as their
TDP is the power at base clock. Makers who publish none (AWS for Graviton) are guessed from their relatives.
The fraction of it that an idle socket draws, 0.2 to 0.3 of servers, is what published results of
SPECpower_ssj2008 show for idle against fully loaded servers of these generations, rounded; 0.05 to 0.15 of
desktops and laptops, whose cores all sleep together. From these, everything is derived by a rule::

    full load of a socket = full load of the member x sqrt(threads of the socket / threads of the member)
    idle                  = idle fraction x full load, of each socket
    per busy core         = (full load - idle) / threads of the socket

The square root because a smaller member of a family has fewer but faster cores: so the TDPs of middle and
large members are met within 30 %, which is the stated uncertainty of a known server (tests hold some thirty
members to it). Desktops and laptops have limits that their makers set as they like: 40 %.

A virtual machine has some of the threads of a socket of unknown size. It is taken for a part of the member
in the table: its idle power is the same fraction of a socket's as its threads are. 40 %, though the family be
known. Arm cores do not say whether they are virtual: a server with fewer than the member is taken for a part,
too, and one with a multiple for several sockets. A CPU that is not in the table is a guess of 60 %.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import sqrt

_KNOWN = 0.3
_BOOSTS_FREELY = 0.4
_VIRTUAL = 0.4
_GUESS = 0.6


@dataclass(frozen=True, slots=True)
class CpuPower:
    """The model of one machine's CPUs: ``idle_w`` + ``per_core_w`` for each busy logical core.

    Attributes:
        idle_w: Power of all of the machine's sockets when idle, in W.
        per_core_w: Power that one busy logical core adds, in W.
        relative_uncertainty: Half of the range within which both are believed to be, as a fraction;
            ``None``: not known.
        basis: What they rest on, in a part of a sentence.
    """

    idle_w: float
    per_core_w: float
    relative_uncertainty: float | None
    basis: str


@dataclass(frozen=True, slots=True)
class _Family:
    """One row of the table.

    Attributes:
        name: What it is called.
        full_w: Power of one socket of the member at full load, in W.
        threads: Logical cores of that socket.
        idle_fraction: Part of ``full_w`` that it draws when idle.
        relative_uncertainty: Of a machine that is not virtual.
        vendor: ``vendor_id``, or ``CPU implementer`` of an Arm core.
        models: (``cpu family``, ``model``) of its members, or (part,) of an Arm core.
        pattern: Regular expression of their ``model name``; where both are given, either will do.
        flag: A CPU flag that no earlier family has.
    """

    name: str
    full_w: float
    threads: int
    idle_fraction: float
    vendor: str
    relative_uncertainty: float = _KNOWN
    models: frozenset[tuple[int, ...]] = frozenset()
    pattern: str = ""
    flag: str = ""

    def has(self, cpu: _Cpu) -> bool:
        if cpu.vendor != self.vendor:
            return False
        by_name = bool(self.pattern) and re.search(self.pattern, cpu.name) is not None
        return by_name or cpu.model in self.models or self.flag in cpu.flags


@dataclass(frozen=True, slots=True)
class _Cpu:
    vendor: str
    name: str
    model: tuple[int, ...]
    flags: frozenset[str]
    num_threads: int
    num_sockets: int

    @property
    def is_virtual(self) -> bool:
        return "hypervisor" in self.flags


def _intel(*models: int) -> frozenset[tuple[int, ...]]:
    return frozenset((6, model) for model in models)


def _amd(family: int, first: int, last: int) -> frozenset[tuple[int, ...]]:
    return frozenset((family, model) for model in range(first, last + 1))


_INTEL, _AMD, _ARM, _AMPERE, _APPLE = "GenuineIntel", "AuthenticAMD", "0x41", "0xc0", "0x61"

# The first that fits is taken. Numbers of models: Linux, arch/x86/include/asm/intel-family.h and
# arch/arm64/include/asm/cputype.h.
_FAMILIES = (
    # Ahead of all: laptops and desktops, whose numbers servers share here and there.
    _Family("Intel Core, laptop with little power", 25, 12, 0.08, _INTEL, _BOOSTS_FREELY,
            pattern=r"Core.* (i\d-\d{4,5}(U|Y|P|G\d)|m\d-\w+|\d \d{3}[UV])\b"),
    _Family("Intel Core, laptop", 60, 16, 0.06, _INTEL, _BOOSTS_FREELY,
            pattern=r"Core.* (i\d-\d{4,5}H\w?|\d \d{3}HX?)\b"),
    _Family("Intel Core or small Xeon, desktop", 150, 16, 0.07, _INTEL, _BOOSTS_FREELY,
            pattern=r"Core.* (i\d-\d{4,5}[BEFKST]{0,2}|\d \d{3}[FKT]{0,2})( |$)"
                    r"|Xeon\(R\) (CPU )?(E3-|E-2|W-1[123])"),
    _Family("AMD Ryzen, laptop", 44, 16, 0.08, _AMD, _BOOSTS_FREELY,
            pattern=r"(?i)Ryzen (AI|.*\d{4}(U|H|HS|HX|HX3D|C)\b)"),
    _Family("AMD Threadripper", 280, 64, 0.2, _AMD, pattern="Threadripper"),
    _Family("AMD Ryzen, desktop", 142, 24, 0.15, _AMD, _BOOSTS_FREELY, pattern="Ryzen"),
    _Family("a small Intel CPU", 15, 4, 0.2, _INTEL, _GUESS, pattern=r"Atom|Celeron|Pentium|\) N\d{2,3}\b"),
    # Servers.
    _Family("Intel Xeon D", 65, 16, 0.2, _INTEL, _BOOSTS_FREELY, pattern=r"Xeon\(R\) (CPU )?D-"),
    _Family("Intel Xeon E5 (Sandy or Ivy Bridge)", 130, 24, 0.25, _INTEL, models=_intel(45, 62)),
    _Family("Intel Xeon E5 (Haswell or Broadwell)", 145, 40, 0.22, _INTEL, models=_intel(63, 79)),
    _Family("Intel Xeon (Skylake to Cooper Lake)", 190, 56, 0.2, _INTEL, models=_intel(85)),
    _Family("Intel Xeon (Ice Lake)", 270, 80, 0.25, _INTEL, models=_intel(106, 108),
            pattern=r"Xeon.*\(Icelake"),
    _Family("Intel Xeon (Granite Rapids)", 500, 256, 0.25, _INTEL, models=_intel(173, 174)),
    _Family("Intel Xeon (Sierra Forest)", 330, 144, 0.25, _INTEL, models=_intel(175)),
    _Family("Intel Xeon (Sapphire Rapids or newer)", 350, 112, 0.3, _INTEL, models=_intel(143, 207),
            flag="amx_tile"),
    _Family("AMD EPYC (Naples)", 180, 64, 0.3, _AMD, models=_amd(23, 0x01, 0x01)),
    _Family("AMD EPYC (Rome)", 225, 128, 0.27, _AMD, models=_amd(23, 0x31, 0x31), pattern="EPYC-Rome"),
    _Family("AMD EPYC (Milan)", 280, 128, 0.25, _AMD, models=_amd(25, 0x00, 0x0F), pattern="EPYC-Milan"),
    _Family("AMD EPYC (Genoa)", 360, 192, 0.25, _AMD, models=_amd(25, 0x10, 0x1F), pattern="EPYC-Genoa"),
    _Family("AMD EPYC (Bergamo or Siena)", 360, 256, 0.25, _AMD, models=_amd(25, 0xA0, 0xAF)),
    _Family("AMD EPYC (Turin)", 500, 256, 0.22, _AMD, models=_amd(26, 0x00, 0x1F), pattern="EPYC-Turin"),
    _Family("Arm Neoverse N1 (Graviton2, Altra)", 180, 80, 0.2, _ARM, models=frozenset({(0xD0C,)})),
    _Family("Arm Neoverse V1 (Graviton3)", 130, 64, 0.2, _ARM, models=frozenset({(0xD40,)})),
    _Family("Arm Neoverse V2 (Grace, Graviton4)", 250, 72, 0.2, _ARM, models=frozenset({(0xD4F,)})),
    _Family("AmpereOne", 350, 160, 0.2, _AMPERE, models=frozenset({(0xAC3,), (0xAC4,)})),
    _Family("Apple M", 30, 10, 0.05, _APPLE, _BOOSTS_FREELY, pattern="^"),
    # Guesses that at least know whether it is a server.
    _Family("an Intel Xeon of an unknown family", 250, 80, 0.25, _INTEL, _GUESS, pattern="Xeon"),
    _Family("an AMD EPYC of an unknown family", 320, 160, 0.25, _AMD, _GUESS, pattern="EPYC"),
)  # fmt: skip

_UNKNOWN = _Family("a CPU of an unknown family", 150, 32, 0.2, "", _GUESS)


def cpu_power(cpuinfo: str, num_threads: int) -> CpuPower:
    """The power model of the machine that ``/proc/cpuinfo`` describes.

    Args:
        cpuinfo: Text of the file; empty where there is none.
        num_threads: Logical cores of the machine, if the text does not tell.
    """
    cpu = _parse(cpuinfo, num_threads)
    family = next((family for family in _FAMILIES if family.has(cpu)), _UNKNOWN)
    uncertainty = family.relative_uncertainty
    is_arm_server = family.vendor in (_ARM, _AMPERE)
    if cpu.is_virtual or (is_arm_server and cpu.num_threads < family.threads):
        sockets, threads = cpu.num_threads / family.threads, float(family.threads)
        uncertainty = max(uncertainty, _VIRTUAL)
        machine = "a virtual machine" if cpu.is_virtual else "a machine"
        basis = (
            f"{family.name}; {machine} with {cpu.num_threads} logical cores of sockets of {family.threads}"
        )
    else:
        # Arm's cpuinfo does not name sockets.
        sockets = float(cpu.num_threads // family.threads if is_arm_server else cpu.num_sockets)
        threads = cpu.num_threads / sockets
        basis = f"{family.name}; {sockets:g} socket{'' if sockets == 1 else 's'} of {threads:g} logical cores"
    full_w = family.full_w * sqrt(threads / family.threads)
    idle_w = family.idle_fraction * full_w
    return CpuPower(
        idle_w=idle_w * sockets,
        per_core_w=(full_w - idle_w) / threads,
        relative_uncertainty=uncertainty,
        basis=f"a guess for {basis}" if uncertainty >= _GUESS else basis,
    )


def _parse(cpuinfo: str, num_threads: int) -> _Cpu:
    first: dict[str, str] = {}
    sockets: set[str] = set()
    found = 0
    for line in cpuinfo.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        found += key == "processor"
        if key == "physical id":
            sockets.add(value)
        first.setdefault(key, value)
    vendor = first.get("vendor_id") or first.get("CPU implementer", "")
    numbers = ("cpu family", "model") if "vendor_id" in first else ("CPU part",)
    try:
        model = tuple(int(first[number], 0) for number in numbers)
    except (KeyError, ValueError):
        model = ()
    return _Cpu(
        vendor=vendor,
        name=first.get("model name", ""),
        model=model,
        flags=frozenset(first.get("flags", "").split()),
        num_threads=found or max(1, num_threads),
        num_sockets=max(1, len(sockets)),
    )
