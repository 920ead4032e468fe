"""Every kind of row that a ledger can hold, as types; the one definition of each field.

A ledger is a file of JSON objects, one a line; ``type`` says which kind a row is. Rows are written by the
run's coordinator alone. ``docs/ledger.md`` is made from this module. It knows nothing of files
(:mod:`eadt.record.ledger`) or of totals (:mod:`eadt.record.books`).

Two time axes. *Node time* (``t0``, ``t1``): monotonic seconds of one machine, comparable on that machine
only. *Session time* (``at_s``): seconds since the present session of the run began, the same for all nodes.
A ``node`` row carries one moment in both.

Unknown is null, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

SCHEMA_VERSION = 1
"""Counts up when a reader of the version before would misread a row."""

Use = Literal["startup", "useful", "validation", "change", "checkpoint", "input", "idle", "lost"]
"""What energy and time were for; see ``docs/ledger.md``. ``lost`` is never booked: a rollback makes it."""

USES: tuple[Use, ...] = (
    "startup", "useful", "validation", "input", "change", "checkpoint", "idle", "lost",
)  # fmt: skip
"""In the order in which reports show them."""

UNDOABLE: frozenset[str] = frozenset({"useful", "validation", "input"})
"""Uses that become ``lost`` when a rollback undoes the steps that they were for."""

NodeName = Annotated[str, Meta(description="Ray's id of the node.")]
NodeTime = Annotated[float, Meta(description="Node time in s.")]
AtS = Annotated[float | None, Meta(description="Session time in s; null: not known.")]
GenerationNumber = Annotated[
    int, Meta(description="Generation of engines, from 1 in each session; 0: none yet.")
]
SettingNumber = Annotated[
    int,
    Meta(description="Number of the setting in force, from 1 in each session; 0: none yet. Two generations "
         "with an equal setpoint, one straight after the other, have one setting."),
]  # fmt: skip
SetpointValues = Annotated[
    dict[str, Any] | None,
    Meta(description="A setpoint: num_workers, workers_per_gpu, mps_active_thread_percentage (%), "
         "power_limit_w (W; null: as it was found), precision, num_frozen_layers, paused; null: not known."),
]  # fmt: skip


class Row(msgspec.Struct, kw_only=True, tag_field="type", omit_defaults=True, gc=False):
    """What every row has; both are filled in by the writer."""

    seq: Annotated[int, Meta(description="Place in its writer's files, counting up from 1.")] = 0
    unix_s: Annotated[float, Meta(description="Wall-clock time of the writing, s since 1970 UTC.")] = 0.0


class LedgerRow(Row, tag="ledger"):
    """The first row of each file: who wrote it, in which version of this format."""

    schema_version: Annotated[int, Meta(description="Version of the format.")]
    eadt_version: Annotated[str, Meta(description="Version of EADT.")] = ""


class SessionRow(Row, tag="session"):
    """A session of the run began: its start, or its going on after an interruption or a crash."""

    run_id: Annotated[str, Meta(description="Id of the run; all sessions of a ledger have the same.")]
    name: Annotated[str, Meta(description="Name of the run.")]
    resumed_step: Annotated[
        int, Meta(description="Steps that were done already in the state that this session goes on from.")
    ] = 0
    train_batch_size: Annotated[int | None, Meta(description="Samples per optimizer step.")] = None
    sequence_length: Annotated[int | None, Meta(description="Tokens per sample; null: not known.")] = None
    max_steps: Annotated[int | None, Meta(description="Steps at which the run is complete.")] = None
    config: Annotated[dict[str, Any], Meta(description="The configuration.")] = {}
    versions: Annotated[dict[str, str], Meta(description="Versions of the software.")] = {}


class EndRow(Row, tag="end"):
    """A session ended in order. A session without one ended without a word."""

    status: Annotated[str, Meta(description="completed, interrupted or failed.")]
    reason: Annotated[str, Meta(description="Why, where it did not complete.")] = ""
    num_params: Annotated[int | None, Meta(description="Parameters of the model; null: not known.")] = None
    at_s: AtS = None


class MeteredComponent(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """One component that a node books: a column of its ``energy`` rows."""

    component: Annotated[str, Meta(description="cpu, dram or gpu<number>.")]
    source: Annotated[
        str,
        Meta(description="nvml_energy_counter, nvml_power, rapl, cpu_estimate, simulated or none."),
    ]
    quality: Annotated[
        str | None, Meta(description="measured, estimated or simulated; null: nothing can measure it.")
    ]
    detail: Annotated[str, Meta(description="How, in a sentence.")] = ""
    identity: Annotated[str, Meta(description="Names the hardware, from wherever it is seen.")] = ""
    resolution_s: Annotated[
        float, Meta(description="Phases shorter than this (s) two readings cannot tell apart.")
    ] = 0.0
    relative_uncertainty: Annotated[
        float | None, Meta(description="Stated error of the source, a fraction; null: not known.")
    ] = None


class NodeRow(Row, tag="node"):
    """A node began to book, or books other components from now on.

    ``components`` names the columns of this node's ``energy`` rows until its next ``node`` row.
    """

    node: NodeName
    hostname: str | None = None
    boot_id: Annotated[
        str | None, Meta(description="Changes when node time begins anew; null: not known.")
    ] = None
    monotonic_s: Annotated[float, Meta(description="A moment in node time, s,")] = 0.0
    at_s: Annotated[float, Meta(description="and the same moment in session time, s.")] = 0.0
    num_gpus: Annotated[int | None, Meta(description="GPUs of the machine; null: not known.")] = None
    num_cores: Annotated[int | None, Meta(description="CPU cores that training may use.")] = None
    components: list[MeteredComponent] = []
    not_metered: Annotated[
        list[str], Meta(description="Sources that were looked for and are not used: why, and the fix.")
    ] = []


class EnergyRow(Row, tag="energy"):
    """What one node used between two readings.

    An interval ends where the use, the phase or the setting changes and where a state is saved, else every
    ``power.booking_interval`` s.
    """

    node: NodeName
    t0: NodeTime
    t1: NodeTime
    use: Annotated[str, Meta(description="What this node's energy was for.")]
    joules: Annotated[
        list[float | None],
        Meta(description="J by component, in the order of the node row, to 0.001 J, after ``own_fraction``; "
             "null: nothing of the interval is known."),
    ]  # fmt: skip
    step: Annotated[int, Meta(description="Optimizer steps that were done when the interval began.")] = 0
    generation: GenerationNumber = 0
    setting: SettingNumber = 0
    uses: Annotated[
        dict[str, str], Meta(description="Components that were for something else: their use.")
    ] = {}
    qualities: Annotated[
        dict[str, str],
        Meta(description="Components whose quality is not the node row's in this interval (stale)."),
    ] = {}
    unknown_s: Annotated[
        dict[str, float],
        Meta(description="Seconds of the interval that are not in ``joules``, by component."),
    ] = {}
    why_unknown: Annotated[dict[str, str], Meta(description="Why, by component.")] = {}
    recovered_s: Annotated[
        dict[str, float],
        Meta(
            description="Seconds before the interval that ``joules`` covers too, by component: unknown then, "
            "and told now by a counter that went on."
        ),
    ] = {}
    shared: Annotated[
        dict[str, float],
        Meta(description="Fractions of the joules of components whose use is ``use`` that a model, not a "
             "reading, gives to other uses."),
    ] = {}  # fmt: skip
    shared_cpu: Annotated[
        dict[str, float], Meta(description="The same, of cpu and dram alone, on top of ``shared``.")
    ] = {}
    own_fraction: Annotated[
        float | None,
        Meta(description="Fraction of the machine's cpu and dram energy that ``joules`` holds, where others "
             "trained there too; null: all of it."),
    ] = None  # fmt: skip
    foreign: Annotated[
        list[str], Meta(description="GPUs on which other programs ran too: their joules are in ``joules``.")
    ] = []


class DevicesRow(Row, tag="devices"):
    """How a node's cards did over about a minute. Lists are by card, in the order of ``components``."""

    node: NodeName
    t0: NodeTime
    t1: NodeTime
    components: list[str]
    utilisation_fraction: Annotated[
        list[float | None],
        Meta(description="Mean fraction of the time in which a kernel ran; null: unknown."),
    ]
    memory_used_bytes: Annotated[list[int | None], Meta(description="Most memory in use; null: unknown.")]
    memory_total_bytes: list[int | None]
    temperature_c: Annotated[list[float | None], Meta(description="Highest, in °C; null: unknown.")]
    sm_clock_mhz: Annotated[list[float | None], Meta(description="Mean clock of the SMs; null: unknown.")]
    throttled: Annotated[
        list[dict[str, float]],
        Meta(description="Fraction of the looks at which the driver slowed the card, by reason: heat, "
             "power_cap, power_brake, hardware, other; empty: never, or unknown."),
    ]  # fmt: skip
    foreign_processes: Annotated[
        list[int | None], Meta(description="Most processes of others at once; null: unknown.")
    ]


class StepsRow(Row, tag="steps"):
    """Optimizer steps, one after the other, of one generation, as rank 0's node saw them.

    Lists are by step.
    """

    node: NodeName
    generation: GenerationNumber
    setting: SettingNumber
    first_step: Annotated[int, Meta(description="Number of the first of them; steps count from 1.")]
    t0: Annotated[list[float], Meta(description="Begin of each, node time in s.")]
    seconds: Annotated[list[float], Meta(description="Length of each in s.")]
    loss: Annotated[list[float | None], Meta(description="Mean over the global batch; null: not finite.")]
    learning_rate: list[float]
    samples: Annotated[int | None, Meta(description="Samples of each step; null: unknown.")] = None
    tokens: Annotated[int | None, Meta(description="Tokens of each step; null: unknown.")] = None
    world_size: Annotated[int | None, Meta(description="Ranks.")] = None
    input_s: Annotated[
        list[float], Meta(description="Of each step, seconds spent waiting for data. Empty: none.")
    ] = []

    @property
    def last_step(self) -> int:
        """Number of the last of them."""
        return self.first_step + len(self.t0) - 1


class TimeRow(Row, tag="time"):
    """What the whole job's time was for: one use, from ``t0_s`` to ``t1_s``."""

    use: str
    t0_s: Annotated[float, Meta(description="Session time in s.")]
    t1_s: Annotated[float, Meta(description="Session time in s.")]
    step: Annotated[int, Meta(description="Optimizer steps that were done at ``t0_s``.")] = 0
    generation: GenerationNumber = 0
    setting: SettingNumber = 0
    shared: Annotated[dict[str, float], Meta(description="Fractions that were for other uses.")] = {}


class RollbackRow(Row, tag="rollback"):
    """The run fell back: what was done after ``resumed_step``, up to this generation's end, is lost.

    It undoes what was booked before and after this row with a generation up to this one (of this session or
    one before) and a ``step`` of at least ``resumed_step``.
    """

    generation: GenerationNumber
    resumed_step: Annotated[int, Meta(description="Steps that are done in the state gone back to.")]
    reason: str = ""
    at_s: AtS = None


class GenerationRow(Row, tag="generation"):
    """A generation of engines began to train, or ended."""

    event: Annotated[str, Meta(description="started or ended.")]
    generation: GenerationNumber
    setting: SettingNumber = 0
    step: Annotated[int | None, Meta(description="Optimizer steps that were done.")] = None
    setpoint: SetpointValues = None
    world_size: Annotated[int | None, Meta(description="Ranks.")] = None
    micro_batch: Annotated[int | None, Meta(description="Samples of one forward pass of one rank.")] = None
    accumulation: Annotated[int | None, Meta(description="Forward passes per rank and step.")] = None
    num_devices: Annotated[int | None, Meta(description="GPUs (CPU nodes) with ranks.")] = None
    shares: Annotated[list[dict[str, Any]], Meta(description="Each rank's share of its device.")] = []
    remote_bytes: Annotated[int | None, Meta(description="State that came from other nodes.")] = None
    reason: str = ""
    at_s: AtS = None


class ChangeRow(Row, tag="change"):
    """A change of the setting, or a recovery to the same one: the last step before to the first after."""

    kind: Annotated[str, Meta(description="in_place, group or restart.")]
    recovery: Annotated[bool, Meta(description="Whether the setting stayed as it was.")] = False
    from_workers: int | None = None
    to_workers: int | None = None
    seconds: Annotated[
        float | None,
        Meta(description="Pause in s: from the end of the last step before to the end of the first after, "
             "less an ordinary step."),
    ] = None  # fmt: skip
    ordinary_step_s: float | None = None
    lost_steps: int | None = None
    parts: Annotated[dict[str, float], Meta(description="What it consisted of, in s.")] = {}
    setpoint_before: SetpointValues = None
    setpoint_after: SetpointValues = None
    decision_id: Annotated[str | None, Meta(description="The decision behind it; null: none.")] = None
    reason: str = ""
    at_s: AtS = None


class ValidationRow(Row, tag="validation"):
    """A validation loss."""

    step: Annotated[int, Meta(description="Optimizer steps that were done.")]
    loss: Annotated[float | None, Meta(description="Null: not finite.")]
    generation: GenerationNumber = 0
    at_s: AtS = None


class DecisionRow(Row, tag="decision"):
    """A decision of the supervisor, or news of one: a later row with the same id takes its place."""

    decision_id: str
    action: str = ""
    reason: str = ""
    setpoint_before: SetpointValues = None
    setpoint_after: SetpointValues = None
    setpoint_wanted: SetpointValues = None
    expected: Annotated[dict[str, Any] | None, Meta(description="What it is expected to bring.")] = None
    measured: Annotated[
        dict[str, Any] | None, Meta(description="What was measured after it; null: nothing yet.")
    ] = None
    outcome: Annotated[str, Meta(description="pending, kept, reverted, held, failed or refused.")] = "pending"
    repeats: Annotated[int | None, Meta(description="How often a hold was decided in a row.")] = None
    until_s: AtS = None
    at_s: AtS = None


class ObservationRow(Row, tag="observation"):
    """One window of the supervisor's: throughput and power at one setting."""

    at_s: AtS
    window_s: Annotated[float, Meta(description="Length in s.")]
    setpoint: SetpointValues
    num_gpus: Annotated[int, Meta(description="GPUs (CPU nodes) in use.")] = 0
    samples_per_second: Annotated[float | None, Meta(description="Null: no step ended.")] = None
    power_w: Annotated[float | None, Meta(description="Of the devices in use, W; null: unknown.")] = None
    num_steps: Annotated[int, Meta(description="Steps that ended in it.")] = 0
    quality: Annotated[str, Meta(description="Worst quality of the readings.")] = "measured"
    power_per_gpu_w: Annotated[float | None, Meta(description="W; null: unknown.")] = None
    efficiency_samples_per_j: Annotated[float | None, Meta(description="Null: unknown.")] = None


class CheckpointRow(Row, tag="checkpoint"):
    """A checkpoint was written."""

    step: int
    path: str = ""
    kind: Annotated[str, Meta(description="periodic, just_in_time or final.")] = ""
    seconds: float | None = None
    num_bytes: int | None = None
    at_s: AtS = None


class FaultRow(Row, tag="fault"):
    """Something went wrong while the run went on."""

    kind: str
    node: Annotated[str | None, Meta(description="Ray's id of the node; null: none in particular.")] = None
    detail: str = ""
    generation: int | None = None
    at_s: AtS = None


class NoteRow(Row, tag="note"):
    """A sentence that the user should read."""

    code: Annotated[str, Meta(description="EADT- and three digits.")]
    text: str
    at_s: AtS = None


AnyRow = (
    LedgerRow | SessionRow | EndRow | NodeRow | EnergyRow | DevicesRow | StepsRow | TimeRow | RollbackRow
    | GenerationRow | ChangeRow | ValidationRow | DecisionRow | ObservationRow | CheckpointRow | FaultRow
    | NoteRow
)  # fmt: skip

ROW_TYPES: tuple[type[Row], ...] = AnyRow.__args__

_DECODER: msgspec.json.Decoder[AnyRow] = msgspec.json.Decoder(AnyRow)
_ENCODER = msgspec.json.Encoder()


def encode(row: Row) -> bytes:
    """A row as one line of JSON, without the line's end. NaN and infinities become null.

    Raises:
        TypeError: The row holds what JSON cannot.
    """
    return _ENCODER.encode(row)


def decode(line: bytes) -> AnyRow:
    """The row in one line of JSON.

    Raises:
        msgspec.ValidationError: It is no row: of an unknown type, or a field is missing or of another kind.
        msgspec.DecodeError: It is no JSON.
    """
    return _DECODER.decode(line)


def kind_of(row: Row) -> str:
    """The row's ``type``."""
    tag: str = row.__struct_config__.tag  # type: ignore[assignment]
    return tag


def as_event(row: Row) -> dict[str, Any]:
    """A row as the plain dictionary that ``on_event`` callbacks get: ``type``, and every field of its own."""
    return {"type": kind_of(row)} | {
        name: msgspec.to_builtins(getattr(row, name))
        for name in row.__struct_fields__
        if name not in ("seq", "unix_s")
    }


def row_from(kind: str, values: Mapping[str, Any]) -> AnyRow:
    """A row from plain values, checked.

    Raises:
        msgspec.ValidationError: They do not make a row of that kind.
    """
    row: AnyRow = msgspec.convert({**values, "type": kind}, AnyRow)
    return row
