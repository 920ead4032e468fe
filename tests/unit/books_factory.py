"""SYNTHETIC typed rows for tests of what reads the record: no run ever produced these numbers.

:class:`RowList` makes rows one by one with short calls, in a ledger's order; :func:`a_run` is a whole
pretended run with something of everything, :func:`any_ledger` draws any of them. ``Books`` of them:
:func:`books_of`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from hypothesis import strategies as st

from eadt.record.books import Books
from eadt.record.rows import (
    AnyRow,
    ChangeRow,
    CheckpointRow,
    DecisionRow,
    DevicesRow,
    EndRow,
    EnergyRow,
    FaultRow,
    GenerationRow,
    LedgerRow,
    MeteredComponent,
    NodeRow,
    NoteRow,
    ObservationRow,
    RollbackRow,
    SessionRow,
    StepsRow,
    TimeRow,
    ValidationRow,
)

START_UNIX_S = 1_750_000_000.0
NODE, OTHER = "synthetic-node-a", "synthetic-node-b"
ORIGIN_S = 1000.0
"""Node time of every node when a session begins, unless a test says otherwise."""


def component(
    name: str,
    quality: str | None = "simulated",
    *,
    resolution_s: float = 0.0,
    relative: float | None = 0.05,
    identity: str = "",
    detail: str = "",
) -> MeteredComponent:
    return MeteredComponent(
        component=name,
        source="simulated" if quality else "none",
        quality=quality,
        detail=detail,
        identity=identity,
        resolution_s=resolution_s,
        relative_uncertainty=relative,
    )


class RowList:
    """Rows in a ledger's order. Times are session time in s; node time is ``ORIGIN_S`` more."""

    def __init__(self) -> None:
        self.rows: list[AnyRow] = []
        self.unix_s = START_UNIX_S

    def add(self, row: AnyRow) -> AnyRow:
        row.seq = len(self.rows) + 1
        row.unix_s = self.unix_s
        self.rows.append(row)
        return row

    def session(self, resumed_step: int = 0, **columns: Any) -> None:
        values = {"run_id": "synthetic-1", "name": "synthetic", "train_batch_size": 8} | columns
        self.add(LedgerRow(schema_version=1))
        self.add(SessionRow(resumed_step=resumed_step, **values))

    def end(self, status: str = "completed", at_s: float | None = None, **columns: Any) -> None:
        self.add(EndRow(status=status, at_s=at_s, **columns))

    def node(
        self,
        components: str | Sequence[MeteredComponent] = "cpu",
        *,
        node: str = NODE,
        at_s: float = 0.0,
        boot_id: str | None = "boot",
        **columns: Any,
    ) -> None:
        if isinstance(components, str):
            components = [component(name) for name in components.split()]
        self.add(
            NodeRow(
                node=node,
                hostname=f"host-{node[-1]}",
                boot_id=boot_id,
                monotonic_s=at_s + ORIGIN_S,
                at_s=at_s,
                components=list(components),
                **columns,
            )
        )

    def energy(
        self,
        from_s: float,
        to_s: float,
        use: str,
        *joules: float | None,
        node: str = NODE,
        step: int = 0,
        generation: int = 1,
        setting: int = 1,
        **columns: Any,
    ) -> None:
        self.add(
            EnergyRow(
                node=node,
                t0=from_s + ORIGIN_S,
                t1=to_s + ORIGIN_S,
                use=use,
                joules=list(joules),
                step=step,
                generation=generation,
                setting=setting,
                **columns,
            )
        )

    def steps(
        self,
        first_step: int,
        from_s: float,
        *losses: float | None,
        step_s: float = 1.0,
        node: str = NODE,
        generation: int = 1,
        setting: int = 1,
        samples: int | None = 8,
        tokens: int | None = 128,
        world_size: int | None = 2,
    ) -> None:
        self.add(
            StepsRow(
                node=node,
                generation=generation,
                setting=setting,
                first_step=first_step,
                t0=[from_s + ORIGIN_S + number * step_s for number in range(len(losses))],
                seconds=[step_s] * len(losses),
                loss=list(losses),
                learning_rate=[1e-3 / (first_step + number) for number in range(len(losses))],
                samples=samples,
                tokens=tokens,
                world_size=world_size,
            )
        )

    def time(
        self,
        use: str,
        from_s: float,
        to_s: float,
        *,
        step: int = 0,
        generation: int = 1,
        setting: int = 1,
        **columns: Any,
    ) -> None:
        self.add(
            TimeRow(
                use=use, t0_s=from_s, t1_s=to_s, step=step, generation=generation, setting=setting, **columns
            )
        )

    def rollback(self, generation: int, resumed_step: int, at_s: float | None = None) -> None:
        self.add(RollbackRow(generation=generation, resumed_step=resumed_step, at_s=at_s, reason="synthetic"))

    def generation(
        self,
        event: str,
        generation: int,
        at_s: float | None = None,
        *,
        setting: int | None = None,
        setpoint: dict[str, Any] | None = None,
        **columns: Any,
    ) -> None:
        self.add(
            GenerationRow(
                event=event,
                generation=generation,
                setting=generation if setting is None else setting,
                setpoint=setpoint,
                at_s=at_s,
                **columns,
            )
        )

    def validation(
        self, step: int, loss: float | None, generation: int = 1, at_s: float | None = None
    ) -> None:
        self.add(ValidationRow(step=step, loss=loss, generation=generation, at_s=at_s))

    def note(self, text: str, at_s: float | None = None, code: str = "EADT-000") -> None:
        self.add(NoteRow(code=code, text=text, at_s=at_s))


def books_of(rows: RowList | Iterable[AnyRow]) -> Books:
    """The books of these rows."""
    books = Books()
    for row in rows.rows if isinstance(rows, RowList) else rows:
        books.add(row)
    return books


def setpoint(workers: int, share: int = 50) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "workers_per_gpu": 2,
        "mps_active_thread_percentage": share,
        "power_limit_w": None,
        "paused": False,
    }


def a_run(*, ended: bool = True) -> list[AnyRow]:
    """A pretended run: two nodes, startup, two settings, a rollback, a checkpoint, a gap; 100 s long."""
    rows = RowList()
    rows.session(
        max_steps=100,
        sequence_length=16,
        config={"run": {"name": "synthetic"}},
        versions={"eadt": "synthetic"},
    )
    rows.note("SYNTHETIC rows made by tests/unit/books_factory.py", at_s=0.0)
    for node in (NODE, OTHER):
        gpu = component("gpu0", "measured", resolution_s=0.1, relative=0.02, identity=f"GPU-{node}")
        rows.node(
            [component("cpu", "estimated", relative=0.3), gpu],
            node=node,
            num_gpus=1,
            num_cores=8,
            not_metered=["dram: RAPL cannot be read; run as root"],
        )

    def energy(from_s: float, to_s: float, use: str, gpu_j: float | None, **columns: Any) -> None:
        for node in (NODE, OTHER):
            rows.unix_s = START_UNIX_S + to_s
            rows.energy(from_s, to_s, use, (to_s - from_s) * 30.0, gpu_j, node=node, **columns)

    energy(0.0, 10.0, "startup", 600.0, generation=0, setting=0)
    rows.time("startup", 0.0, 10.0, generation=0, setting=0)
    rows.generation("started", 1, 10.0, setpoint=setpoint(4), world_size=4, num_devices=2)
    for number in range(4):
        at_s = 10.0 + 10.0 * number
        first = 1 + 10 * number
        rows.steps(first, at_s, *(3.0 - 0.01 * (first + k) for k in range(10)))
        energy(at_s, at_s + 10.0, "useful", 2400.0, step=first - 1, shared={"input": 0.05})
        rows.time("useful", at_s, at_s + 10.0, step=first - 1, shared={"input": 0.05})
    rows.validation(40, 2.7, at_s=50.0)
    rows.add(CheckpointRow(step=40, path="checkpoints/step-40", kind="periodic", seconds=2.0, at_s=52.0))
    energy(50.0, 52.0, "checkpoint", 200.0, step=40)
    rows.time("checkpoint", 50.0, 52.0, step=40)
    rows.add(
        DecisionRow(
            decision_id="d0001",
            action="decrease",
            reason="<b>synthetic</b>",
            setpoint_before=setpoint(4),
            setpoint_after=setpoint(2),
            at_s=52.0,
        )
    )
    rows.generation("ended", 1, 52.0, reason="decision d0001")
    energy(52.0, 55.0, "change", 150.0, step=40, generation=2, setting=2)
    rows.time("change", 52.0, 55.0, step=40, generation=2, setting=2)
    rows.generation("started", 2, 55.0, setpoint=setpoint(2), world_size=2, num_devices=2)
    rows.add(
        ChangeRow(
            kind="in_place",
            from_workers=4,
            to_workers=2,
            seconds=3.0,
            decision_id="d0001",
            setpoint_before=setpoint(4),
            setpoint_after=setpoint(2),
            at_s=55.0,
        )
    )
    rows.steps(41, 55.0, *(2.6 for _ in range(10)), generation=2, setting=2)
    energy(55.0, 65.0, "useful", 1500.0, step=40, generation=2, setting=2)
    rows.time("useful", 55.0, 65.0, step=40, generation=2, setting=2)
    rows.add(
        FaultRow(kind="engine", node=NODE, detail="synthetic SIGKILL of rank 1", generation=2, at_s=65.0)
    )
    rows.rollback(2, 40, at_s=65.5)
    energy(65.0, 70.0, "change", None, step=50, generation=3, setting=2)
    rows.time("change", 65.0, 70.0, step=50, generation=3, setting=2)
    rows.generation("started", 3, 70.0, setting=2, setpoint=setpoint(2), world_size=2, num_devices=2)
    for number in range(3):
        at_s = 70.0 + 10.0 * number
        first = 41 + 10 * number
        rows.steps(first, at_s, *(2.6 for _ in range(10)), generation=3, setting=2)
        energy(at_s, at_s + 10.0, "useful", 1500.0, step=first - 1, generation=3, setting=2)
        rows.time("useful", at_s, at_s + 10.0, step=first - 1, generation=3, setting=2)
    rows.add(DecisionRow(decision_id="d0001", measured={"power_w": 180.0}, outcome="kept", at_s=90.0))
    rows.add(
        ObservationRow(
            at_s=90.0,
            window_s=30.0,
            setpoint=setpoint(2),
            num_gpus=2,
            samples_per_second=8.0,
            power_w=300.0,
            num_steps=30,
        )
    )
    for node in (NODE, OTHER):
        rows.add(
            DevicesRow(
                node=node,
                t0=ORIGIN_S + 10.0,
                t1=ORIGIN_S + 70.0,
                components=["gpu0"],
                utilisation_fraction=[0.8],
                memory_used_bytes=[3 << 30],
                memory_total_bytes=[8 << 30],
                temperature_c=[71.0],
                sm_clock_mhz=[1410.0],
                throttled=[{"heat": 0.25}],
                foreign_processes=[0],
            )
        )
    rows.validation(70, 2.5, generation=3, at_s=100.0)
    if ended:
        rows.end("completed", 100.0, num_params=1_000_000)
    return rows.rows


# -- any ledger -------------------------------------------------------------------------------------------

_COLUMNS = (
    [component("cpu", "estimated", relative=None), component("gpu0", "measured", resolution_s=0.5)],
    [
        component("cpu", "estimated", resolution_s=0.2, relative=0.3),
        component("dram", "measured", identity="board"),
        component("gpu0", "measured", relative=0.02, identity="card"),
    ],
    [component("gpu0", "measured", relative=0.02, identity="card"), component("gpu1", None, detail="AMD")],
    [],
)
_USES = ("startup", "useful", "validation", "input", "change", "checkpoint", "idle")
_NODES = (NODE, OTHER, "synthetic-node-c")
_fractions = st.sampled_from([0.0, 0.1, 0.3334, 0.5, 0.9, 1.0, 1.5, -0.2])
_shares = st.dictionaries(st.sampled_from(["input", "change", "useful"]), _fractions, max_size=2)
_joules = st.one_of(
    st.none(),
    st.integers(0, 5000).map(lambda mj: mj / 1000),
    st.sampled_from([0.0, -1.0, 1e20, 0.0004, 7.7775]),
)
_lengths = st.sampled_from([0.0, 0.0004, 0.4, 1.0, 2.5, 10.0])
_few = st.integers(0, 3)

_OPERATIONS = st.one_of(
    st.tuples(
        st.just("energy"),
        st.sampled_from(_NODES),
        st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.0005, 2.0, 80.0, -0.4]),
        _lengths,
        st.sampled_from(_USES),
        st.lists(_joules, min_size=3, max_size=3),
        st.sampled_from([0, 0, 0, 0, -2, 3]),
        _few,
        st.fixed_dictionaries(
            {},
            optional={
                "uses": st.dictionaries(st.sampled_from(["cpu", "gpu0"]), st.sampled_from(_USES), max_size=2),
                "qualities": st.dictionaries(
                    st.sampled_from(["gpu0", "gpu1"]), st.sampled_from(["stale", "measured"]), max_size=1
                ),
                "unknown_s": st.dictionaries(
                    st.sampled_from(["cpu", "gpu0"]), st.sampled_from([0.0, 0.3, 99.0, -1.0]), max_size=2
                ),
                "recovered_s": st.dictionaries(
                    st.sampled_from(["cpu", "gpu0"]), st.sampled_from([0.2, 5.0, 1e6, -1.0]), max_size=2
                ),
                "why_unknown": st.just({"gpu0": "the driver did not answer"}),
                "shared": _shares,
                "shared_cpu": _shares,
                "own_fraction": st.sampled_from([None, 0.5]),
                "foreign": st.lists(st.sampled_from(["gpu0", "gpu1"]), max_size=2, unique=True),
            },
        ),
    ),
    st.tuples(
        st.just("steps"),
        st.sampled_from(_NODES),
        st.sampled_from([1, 1, 1, 1, 3, 0, -2]),
        st.integers(1, 4),
        _few,
        st.sampled_from([8, 8, None]),
    ),
    st.tuples(st.just("time"), st.sampled_from(_USES), _lengths, st.sampled_from([0, 0, -2]), _few, _shares),
    st.tuples(st.just("rollback"), st.integers(0, 6), st.integers(0, 1)),
    st.tuples(
        st.just("node"),
        st.sampled_from(_NODES),
        st.integers(0, 3),
        st.sampled_from(["keep", "keep", "keep", "reboot", "late"]),
    ),
    st.tuples(st.just("session"), st.integers(-4, 2), st.sampled_from(["", "completed"])),
    st.tuples(st.just("generation"), st.booleans()),
    st.tuples(st.just("validation"), st.integers(-2, 1), _few),
    st.tuples(st.just("checkpoint")),
    st.tuples(st.just("again"), st.integers(0, 20)),
    st.tuples(st.just("nonsense"), st.sampled_from(["backwards", "columns", "node", "lists", "number"])),
)


@st.composite
def any_ledger(draw: st.DrawFn, max_size: int = 60, *, sound: bool = False) -> list[AnyRow]:
    """Rows that a coordinator could have written, or nearly so: late, twice, with holes, some nonsense.

    Args:
        draw: Of Hypothesis.
        max_size: At most so many operations.
        sound: Begin with a session, introduce nodes in each, and leave nonsense out.
    """
    rows = RowList()
    introduced: set[str] = set()
    fresh = 0
    begun_at = draw(st.sampled_from([0, 0, 5]))
    if sound or draw(st.booleans()):
        rows.session(begun_at, sequence_length=draw(st.sampled_from([None, 16])))
    for node in _NODES[: draw(st.integers(0, 2))]:
        rows.node(_COLUMNS[1], node=node)
        introduced.add(node)
    ends: dict[str, float] = {}
    boots = 0
    step, generation, setting, time_s = begun_at if sound else 0, 1, 1, 0.0
    for operation, *values in draw(st.lists(_OPERATIONS, max_size=max_size)):
        rows.unix_s += 1.0
        if operation == "energy":
            node, hole_s, length_s, use, joules, late, back, columns = values
            if sound and node not in introduced:
                continue
            if sound:
                columns = columns | {
                    name: {part: abs(seconds) for part, seconds in columns[name].items()}
                    for name in ("unknown_s", "recovered_s")
                    if name in columns
                }
            known = next(
                (row for row in rows.rows[::-1] if isinstance(row, NodeRow) and row.node == node), None
            )
            width = len(known.components) if known else 2
            begin = ends.get(node, 0.0) + hole_s
            ends[node] = max(ends.get(node, 0.0), begin + length_s)
            rows.energy(
                begin,
                begin + length_s,
                use,
                *joules[:width],
                node=node,
                step=max(step + late, 0),
                generation=max(generation - back, 0),
                setting=max(setting - back, 0),
                **columns,
            )
        elif operation == "steps":
            node, after, number, back, samples = values
            first = max(step + after, begun_at + 1 if sound else 1)
            begin = ends.get(node, 0.0)
            rows.steps(
                first,
                begin,
                *(1.0 / (first + k) for k in range(number)),
                step_s=0.5,
                node=node,
                generation=max(generation - back, 0),
                setting=max(setting - back, 0),
                samples=samples,
                tokens=None if samples is None else samples * 16,
            )
            step = max(step, first + number - 1)
        elif operation == "time":
            use, length_s, late, back, shared = values
            rows.time(
                use,
                time_s,
                time_s + length_s,
                step=max(step + late, 0),
                generation=max(generation - back, 0),
                setting=max(setting - back, 0),
                shared=shared,
            )
            time_s += length_s
        elif operation == "rollback":
            back, older = values
            step = max(step - back, 0)
            begun_at = min(begun_at, step)
            rows.rollback(max(generation - (0 if sound else older), 0), step, time_s)
            generation += 1
        elif operation == "node":
            node, columns, kind = values
            introduced.add(node)
            fresh = len(rows.rows)
            at_s = max(ends.get(node, 0.0), 0.0) + (1.5 if kind == "late" else 0.0)
            if kind == "reboot":
                boots += 1
                rows.node(_COLUMNS[columns], node=node, at_s=at_s, boot_id=f"boot-{boots}")
                rows.rows[-1].monotonic_s = ORIGIN_S
                ends[node] = 0.0
            else:
                boot = next(
                    (row.boot_id for row in rows.rows[::-1] if isinstance(row, NodeRow) and row.node == node),
                    "boot",
                )
                rows.node(_COLUMNS[columns], node=node, at_s=at_s, boot_id=boot)
        elif operation == "session":
            back, status = values
            if status:
                rows.end(status, time_s)
            step = max(step + back, 0)
            begun_at = min(begun_at, step)
            rows.session(step, train_batch_size=8)
            introduced, fresh = set(), len(rows.rows)
            ends, time_s, generation, setting = {}, 0.0, 1, 1
        elif operation == "generation":
            generation += 1
            setting += values[0]
            rows.generation("started", generation, time_s, setting=setting, setpoint=setpoint(setting))
        elif operation == "validation":
            rows.validation(max(step + values[0], 0), 2.0, max(generation - values[1], 0), time_s)
        elif operation == "checkpoint":
            rows.add(CheckpointRow(step=step, at_s=time_s))
        elif operation == "again" and rows.rows:
            place = values[0] % len(rows.rows)
            row = rows.rows[place]
            if not (sound and place < fresh) and isinstance(row, EnergyRow | StepsRow):
                rows.add(msgspec.structs.replace(row))
        elif operation == "nonsense" and not sound:
            _add_nonsense(rows, values[0])
    return rows.rows


def _add_nonsense(rows: RowList, kind: str) -> None:
    if kind == "backwards":
        rows.energy(5.0, 4.0, "useful", 1.0, 1.0, 1.0)
    elif kind == "columns":
        rows.energy(0.0, 1.0, "useful", *[1.0] * 9)
    elif kind == "node":
        rows.energy(0.0, 1.0, "useful", 1.0, node="never-told")
    elif kind == "lists":
        rows.steps(1, 0.0, 1.0, 1.0)
        rows.rows[-1].seconds = [1.0]
    else:
        rows.energy(0.0, 1.0, "useful", 1.0, 1.0, 1.0, generation=-1)
