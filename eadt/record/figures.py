"""What :class:`eadt.record.books.Books` answers, as plain values; every unit is in the field's name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from eadt.units import Quantity


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Which run this is; ``None`` where no row said it.

    Attributes:
        run_id: Id, the same in all sessions.
        name: Name.
        num_params: Parameters of the model.
        train_batch_size: Samples per optimizer step.
        sequence_length: Tokens per sample.
        max_steps: Steps at which it is complete.
        config: The configuration of the newest session.
        versions: Versions of the software in the newest session.
    """

    run_id: str | None = None
    name: str | None = None
    num_params: int | None = None
    train_batch_size: int | None = None
    sequence_length: int | None = None
    max_steps: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionTally:
    """One session of the run: from its start to its end, or to when it was last heard of.

    Attributes:
        index: From 0.
        started_unix_s: Wall time of its start.
        heard_unix_s: Wall time of its last row.
        offset_s: Where it begins on the run's time axis, which leaves out the time between sessions.
        seconds: Length in s, by the coordinator's monotonic clock.
        resumed_step: Steps that were done in the state that it went on from.
        status: ``completed``, ``interrupted``, ``failed``; ``running`` for the newest without an end;
            ``no word`` for an earlier one without an end.
        reason: Why it ended so.
    """

    index: int
    started_unix_s: float
    heard_unix_s: float
    offset_s: float
    seconds: float
    resumed_step: int
    status: str
    reason: str


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch in which a component's energy is unknown; times on the run's axis, in s."""

    node: str
    component: str
    at_s: float
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """What is missing in the energy: it is unknown, and counted nowhere.

    Attributes:
        component_seconds: Seconds without a value, summed over nodes and components.
        fraction: Their fraction of all component-seconds, 0 to 1.
        num_gaps: Stretches.
        longest: At most 100 of them, longest first.
    """

    component_seconds: float
    fraction: float
    num_gaps: int
    longest: tuple[Gap, ...]


@dataclass(frozen=True, slots=True)
class PartTally:
    """What was measured under one setting, or by one generation.

    Attributes:
        number: Of the setting or generation, in its session.
        session: Index of the session.
        setpoint: Its setpoint; ``None``: no generation row said it.
        seconds: Job time in s.
        energy_j: All energy in J; ``None``: nothing was measured.
        useful_j: Energy of useful work in J.
        samples: Samples of steps that count.
        num_steps: Steps that count.
    """

    number: int
    session: int
    setpoint: dict[str, Any] | None
    seconds: float
    energy_j: float | None
    useful_j: float | None
    samples: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class NodeTally:
    """One node: what it is, what it could measure, and what it used.

    Attributes:
        node: Ray's id.
        hostname: For people.
        num_gpus: GPUs of the machine.
        num_cores: CPU cores that training may use.
        components: Per component that it ever booked: component, source, quality, detail, resolution_s,
            relative_uncertainty.
        not_metered: Why sources are not used, and the fix.
        energy: J; ``None``: nothing was measured.
    """

    node: str
    hostname: str | None
    num_gpus: int | None
    num_cores: int | None
    components: tuple[dict[str, Any], ...]
    not_metered: tuple[str, ...]
    energy: Quantity | None


@dataclass(frozen=True, slots=True)
class DeviceTally:
    """How one card did over the run; ``None``: unknown.

    Attributes:
        node: Ray's id of its node.
        component: ``gpu<number>``.
        seconds: Time that was looked at, in s.
        utilisation_fraction: Mean.
        memory_used_bytes: Most.
        memory_total_bytes: In all.
        temperature_c: Highest.
        sm_clock_mhz: Mean.
        throttled: Fraction of the time in which the driver slowed it, by reason.
        foreign_processes: Most processes of others at once.
    """

    node: str
    component: str
    seconds: float
    utilisation_fraction: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    temperature_c: float | None
    sm_clock_mhz: float | None
    throttled: dict[str, float]
    foreign_processes: int | None


@dataclass(frozen=True, slots=True)
class Binned:
    """Means over bins of equal width from the run's begin on; ``None`` in a bin: not known.

    Attributes:
        bin_s: Width in s.
        values: By name; each as long as the others.
    """

    bin_s: float
    values: dict[str, tuple[float | None, ...]]


@dataclass(frozen=True, slots=True)
class Points:
    """Values at times on the run's axis: (step, at_s, value)."""

    points: tuple[tuple[int, float, float | None], ...]


@dataclass(frozen=True, slots=True)
class Series:
    """A run over time, thinned to at most some thousand values each.

    Attributes:
        power_w: Mean W by component over all nodes, and in ``total``.
        samples_per_second: ``total``: samples of steps that count, per s.
        samples_per_joule: ``total``: samples of steps that count over energy, in wider bins.
        settings: (at_s, setpoint) from which each setting was in force.
        loss: Loss by step.
        validation_loss: Validation loss by step.
        uses: (from_s, to_s, use): what the job's time was for.
    """

    power_w: Binned
    samples_per_second: Binned
    samples_per_joule: Binned
    settings: tuple[tuple[float, dict[str, Any]], ...]
    loss: Points
    validation_loss: Points
    uses: tuple[tuple[float, float, str], ...]
