"""The ledger's files: what is written is read back; what is damaged is counted and named; no row is lost."""

from __future__ import annotations

import errno
import gc
import gzip
import logging
import math
import os
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eadt.record.ledger import (
    Damage,
    LedgerWriter,
    OpenedLedger,
    digest,
    iter_ledger,
    open_books,
    output,
    read_ledger,
    reader,
)
from eadt.record.ledger.digest import RunningDigest
from eadt.record.ledger.files import LedgerFile, compress
from eadt.record.ledger.opening import open_ledger
from eadt.record.ledger.output import LedgerOutput
from eadt.record.rows import (
    AnyRow,
    DecisionRow,
    EnergyRow,
    FaultRow,
    LedgerRow,
    MeteredComponent,
    NodeRow,
    NoteRow,
    ObservationRow,
    SessionRow,
    StepsRow,
    encode,
)
from eadt.testing.clock import FakeClock


class Tally(msgspec.Struct):
    """Stands in for books: equal only where the same rows came in the same order."""

    num_rows: int = 0
    crc: int = 0
    version: int = 1

    def add(self, row: AnyRow) -> None:
        self.num_rows += 1
        self.crc = zlib.crc32(encode(row), self.crc)

    def to_state(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_state(cls, state: bytes) -> Tally:
        tally = msgspec.json.decode(state, type=cls)
        if tally.version != 1:
            raise ValueError("another version")
        return tally


def note(number: int = 0, text: str = "") -> NoteRow:
    return NoteRow(code=f"EADT-{number:03}", text=text)


def codes(folder: Path) -> list[str]:
    return [row.code for row in read_ledger(folder).of_type(NoteRow)]


def new_output(folder: Path, clock: FakeClock | None = None, **values: Any) -> LedgerOutput:
    settings = {"rotate_bytes": 1 << 30, "rotate_s": 1e9, **values}
    return LedgerOutput(folder, clock or FakeClock(), **settings)


def write_ledger(folder: Path, *numbers: int) -> None:
    with LedgerWriter(folder, FakeClock()) as writer:
        for number in numbers:
            writer.append(note(number))


def write_with_digest(folder: Path, *numbers: int, **values: Any) -> None:
    with LedgerWriter(folder, FakeClock(), opened=open_ledger(folder, Tally), **values) as writer:
        for number in numbers:
            writer.append(note(number))


# -- writing --------------------------------------------------------------------------------------


def test_rows_come_back_with_their_place_and_wall_time(tmp_path: Path) -> None:
    clock = FakeClock(unix_s=1_700_000_000.0004)
    with LedgerWriter(tmp_path / "ledger", clock) as writer:
        writer.append(note(1, "eins"))
        assert writer.flush()
        clock.advance(1.5)
        writer.append(FaultRow(kind="engine", detail="ü"))
    contents = read_ledger(tmp_path / "ledger")
    head, first, second = contents.rows
    assert isinstance(head, LedgerRow)
    assert head.schema_version == 1
    assert [row.seq for row in contents.rows] == [1, 2, 3]
    assert [row.unix_s for row in (first, second)] == [1_700_000_000.0, 1_700_000_001.5]
    assert second == FaultRow(kind="engine", detail="ü", seq=3, unix_s=1_700_000_001.5)
    assert contents.damage == Damage(num_files=1, num_rows=3)
    assert not contents.damage


def test_a_row_is_written_as_it_was_when_it_was_appended(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, FakeClock())
    row = note(1, "before")
    writer.append(row)
    row.text = "after"
    writer.append(row)
    writer.close()
    assert [row.text for row in read_ledger(tmp_path).of_type(NoteRow)] == ["before", "after"]


def test_a_row_read_from_a_ledger_gets_its_place_in_the_new_one(tmp_path: Path) -> None:
    write_ledger(tmp_path / "old", 1, 2, 3)
    old = read_ledger(tmp_path / "old").rows[-1]
    with LedgerWriter(tmp_path / "new", FakeClock()) as writer:
        writer.append(old)
    assert [row.seq for row in read_ledger(tmp_path / "new").rows] == [1, 2]
    assert old.seq == 4
    assert (tmp_path / "new" / "events-1.jsonl").read_text().count('"seq"') == 2


def test_appending_fills_in_the_wall_time_for_the_books_of_the_caller(tmp_path: Path) -> None:
    row, own = note(1), NoteRow(code="EADT-002", text="", unix_s=5.0)
    with LedgerWriter(tmp_path, FakeClock(unix_s=1_700_000_000.0)) as writer:
        writer.append(row)
        writer.append(own)
    assert (row.unix_s, own.unix_s) == (1_700_000_000.0, 5.0)


def test_nothing_is_made_before_the_first_row(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path / "ledger", FakeClock())
    writer.start()
    assert writer.close()
    assert not (tmp_path / "ledger").exists()
    assert read_ledger(tmp_path / "ledger").rows == ()
    assert not read_ledger(tmp_path / "ledger").damage


def test_rows_reach_the_file_without_being_asked_to(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, FakeClock())
    writer.start()
    writer.append(note(1))
    deadline = threading.Event()
    for _ in range(1000):
        if codes(tmp_path):
            break
        deadline.wait(0.005)
    assert codes(tmp_path) == ["EADT-001"]
    writer.close()


def test_each_writer_has_its_own_file_and_files_are_ordered_by_number(tmp_path: Path) -> None:
    for number in range(11):  # 10 and 11 sort before 2 as text
        write_ledger(tmp_path, number)
    assert codes(tmp_path) == [f"EADT-{number:03}" for number in range(11)]
    assert (tmp_path / "events-11.jsonl").exists()
    (tmp_path / "few").mkdir()
    for number in (8, 16, 1):
        (tmp_path / "few" / f"events-{number}.jsonl").write_bytes(encode(note(number)))
    assert codes(tmp_path / "few") == ["EADT-001", "EADT-008", "EADT-016"]


def test_two_writers_at_once_do_not_share_a_file(tmp_path: Path) -> None:
    first, second = LedgerWriter(tmp_path, FakeClock()), LedgerWriter(tmp_path, FakeClock())
    for writer, number in ((first, 1), (second, 2), (first, 3)):
        writer.start()
        writer.append(note(number))
        assert writer.flush()
    second.close()  # it compresses what others left behind, but not what is being written
    first.append(note(4))
    first.close()
    assert codes(tmp_path) == ["EADT-001", "EADT-003", "EADT-004", "EADT-002"]
    assert sorted(os.listdir(tmp_path)) == ["events-1.jsonl", "events-2.jsonl"]


def test_numbers_of_numpy_and_paths_are_written_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path, FakeClock()) as writer:
        writer.append(
            ObservationRow(at_s=1.0, window_s=np.float64(2.5), setpoint={"n": np.int64(3)}, power_w=math.nan)
        )
        writer.append(DecisionRow(decision_id="d", expected={"path": tmp_path, "worse": -math.inf}))
    observation, decision = read_ledger(tmp_path).rows[1:]
    assert isinstance(observation, ObservationRow)
    assert (observation.window_s, observation.setpoint, observation.power_w) == (2.5, {"n": 3}, None)
    assert isinstance(decision, DecisionRow)
    assert decision.expected == {"path": str(tmp_path), "worse": None}


def test_a_row_that_json_cannot_hold_is_said_and_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("eadt.record.ledger.writer.MAX_LINE_BYTES", 1000)
    with LedgerWriter(tmp_path, FakeClock()) as writer:
        writer.append(DecisionRow(decision_id="d", expected={"bad": object()}))
        writer.append(note(1, "x" * 1000))
        writer.append(note(2))
    first, second, third = read_ledger(tmp_path).of_type(NoteRow)
    assert "a row of kind decision could not be written: a ledger row cannot hold object" in first.text
    assert "a row of kind note could not be written" in second.text
    assert third.code == "EADT-002"
    assert len(caplog.records) == 2


def test_a_closed_writer_drops_rows_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = LedgerWriter(tmp_path, FakeClock())
    writer.append(note(1))
    assert writer.close()  # it was never started, and yet writes what waits
    assert writer.close()
    assert not caplog.records
    writer.append(note(2))
    writer.append(note(3))
    assert (writer.num_dropped, writer.num_unwritten) == (2, 2)
    assert not writer.close()
    assert codes(tmp_path) == ["EADT-001"]
    assert len(caplog.records) == 1
    assert "closed" in caplog.text


def test_threads_do_not_mix_lines_and_keep_their_order(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, FakeClock(), rotate_bytes=5000)
    writer.start()

    def append(thread: int) -> None:
        for number in range(50):
            writer.append(FaultRow(kind=f"{thread}", detail=f"{number} {'x' * 200}"))

    threads = [threading.Thread(target=append, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.close()
    contents = read_ledger(tmp_path)
    assert [row.seq for row in contents.rows] == list(range(1, len(contents.rows) + 1))
    for index in range(4):
        mine = [row.detail.split()[0] for row in contents.of_type(FaultRow) if row.kind == f"{index}"]
        assert mine == [str(number) for number in range(50)]
    assert not contents.damage


def test_a_killed_process_loses_nothing_that_was_flushed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from eadt.record.ledger import LedgerWriter; from eadt.record.rows import NoteRow\n"
        "writer = LedgerWriter(Path(sys.argv[1]), rotate_bytes=20_000); writer.start()\n"
        "for k in range(2000): writer.append(NoteRow(code=str(k), text='x'))\n"
        "assert writer.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9
    write_ledger(tmp_path, 1)  # finishes what the killed one was compressing
    assert codes(tmp_path) == [*map(str, range(2000)), "EADT-001"]
    assert not read_ledger(tmp_path).damage
    assert not list(tmp_path.glob("*.part"))


# -- a disk that refuses --------------------------------------------------------------------------


class Disk(FileIO):
    """A real file on a pretended disk.

    Class attributes: what the next write calls do: raise an error number, or take only so many bytes; then
    all is well again. ``gate``: closed, writes hang.
    """

    faults: ClassVar[list[tuple[int | None, int]]] = []
    gate = threading.Event()

    def write(self, data: Any) -> int:  # type: ignore[override]
        assert Disk.gate.wait(20)
        if Disk.faults:
            number, num_bytes = Disk.faults.pop(0)
            if number is not None:
                raise OSError(number, os.strerror(number))
            return super().write(bytes(data)[:num_bytes])
        return super().write(data)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Disk]]:
    monkeypatch.setattr(output, "FileIO", Disk)
    Disk.faults = []
    Disk.gate.set()
    yield Disk
    Disk.gate.set()
    assert Disk.faults == []  # every fault fired


def test_appending_waits_for_no_disk(tmp_path: Path, disk: type[Disk]) -> None:
    disk.gate.clear()
    writer = LedgerWriter(tmp_path, FakeClock())
    writer.start()
    for number in range(100):
        writer.append(note(number))
    assert not writer.flush(timeout_s=0.0)
    assert writer.num_unwritten == 100
    disk.gate.set()
    assert writer.flush()
    assert writer.num_unwritten == 0
    assert writer.close()
    assert len(codes(tmp_path)) == 100


def test_beyond_the_bound_rows_are_dropped_and_a_note_in_their_place_counts_them(
    tmp_path: Path, disk: type[Disk], caplog: pytest.LogCaptureFixture
) -> None:
    writer = LedgerWriter(tmp_path, FakeClock(), queue_bound=3)
    for number in range(5):
        writer.append(note(number))
    assert (writer.num_dropped, writer.num_unwritten) == (2, 5)
    writer.start()
    assert writer.flush()
    writer.append(note(5))
    assert not writer.close()
    notes = read_ledger(tmp_path).of_type(NoteRow)
    assert [row.code for row in notes] == ["EADT-000", "EADT-001", "EADT-002", "EADT-330", "EADT-005"]
    assert notes[3].text.startswith("2 ledger rows could not be written before this one")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_rows_dropped_at_the_end_are_said_too(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, FakeClock(), queue_bound=1)
    for number in range(3):
        writer.append(note(number))
    assert not writer.close()
    assert codes(tmp_path) == ["EADT-000", "EADT-330"]


def test_on_a_full_disk_rows_wait_and_none_is_lost(
    tmp_path: Path, disk: type[Disk], caplog: pytest.LogCaptureFixture
) -> None:
    disk.faults = [(None, 130), (errno.ENOSPC, 0), (errno.ENOSPC, 0)]
    writer = LedgerWriter(tmp_path, FakeClock())
    writer.append(note(1))
    writer.append(note(2))
    writer.start()
    while len(disk.faults) > 1:
        assert not writer.flush(timeout_s=5.0)
    assert writer.trouble is not None
    assert "No space left" in writer.trouble
    assert read_ledger(tmp_path).damage.torn == ["events-1.jsonl"]  # half a line, for now
    writer.append(note(3))
    while not writer.flush():
        pass
    assert writer.trouble is None
    assert writer.close()
    assert codes(tmp_path) == ["EADT-001", "EADT-002", "EADT-003"]
    assert not read_ledger(tmp_path).damage
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_file_that_cannot_be_written_any_more_is_followed_by_another(
    tmp_path: Path, disk: type[Disk]
) -> None:
    running = RunningDigest(open_ledger(tmp_path, Tally))
    out = new_output(tmp_path, digest=running)
    out.take([encode(note(1))])
    out.drain()
    disk.faults = [(None, 10), (errno.EIO, 0), (errno.ENOSPC, 0)]
    out.take([encode(note(2)), encode(note(3))])
    for _ in range(2):
        with pytest.raises(OSError):  # noqa: PT011
            out.drain()
    assert out.num_waiting == 2
    out.drain()
    out.close()
    contents = read_ledger(tmp_path)
    assert codes(tmp_path) == ["EADT-001", "EADT-002", "EADT-003"]
    assert contents.damage.torn == ["events-1.jsonl"]
    assert contents.damage.num_files == 2
    assert out.num_written == 3
    assert_digest_tells_all(tmp_path)


def test_where_the_folder_cannot_be_made_rows_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eadt.record.ledger.writer._RETRY_S", 60.0)  # flushing tries at once
    (tmp_path / "run").write_text("a file where the folder should be")
    writer = LedgerWriter(tmp_path / "run" / "ledger", FakeClock())
    writer.start()
    writer.append(note(1))
    assert not writer.flush()
    (tmp_path / "run").unlink()
    assert writer.flush()
    writer.close()
    assert codes(tmp_path / "run" / "ledger") == ["EADT-001"]


def test_closing_on_a_disk_that_refuses_ends_and_says_what_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ledger").write_text("a file where the folder should be")
    writer = LedgerWriter(tmp_path / "ledger", FakeClock())
    writer.start()
    writer.append(note(1))
    assert not writer.flush()
    assert not writer.close(timeout_s=0.0)
    assert "the last 1 ledger rows were not written" in caplog.text
    assert "eadt-ledger" not in [thread.name for thread in threading.enumerate()]


def test_an_error_of_the_thread_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("eadt.record.ledger.writer._RETRY_S", 0.01)
    faults = [RuntimeError("a fault")]

    def sync_if_due(_: LedgerOutput) -> None:
        if faults:
            raise faults.pop()

    monkeypatch.setattr(LedgerOutput, "sync_if_due", sync_if_due)
    with LedgerWriter(tmp_path, FakeClock()) as writer:
        writer.append(note(1))
        while faults:
            writer.flush()
        writer.append(note(2))
        assert writer.flush()
    assert codes(tmp_path) == ["EADT-001", "EADT-002"]
    assert "a fault" in caplog.text


def test_fsync_at_most_every_two_seconds_and_at_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[float] = []
    clock = FakeClock(monotonic_s=0.0)
    monkeypatch.setattr(output, "sync_folder", lambda _: None)
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(clock.monotonic_s()))
    out = new_output(tmp_path, clock)
    for number in range(11):
        out.take([encode(note(number))])
        out.drain()
        out.sync_if_due()
        clock.advance(0.5)
    assert synced == [0.0, 2.0, 4.0]
    assert out.due_in_s == 0.5
    clock.advance(0.5)
    assert out.due_in_s == 0.0
    out.sync_if_due()
    assert out.due_in_s is None
    out.take([encode(note(11))])
    out.drain()
    out.close()
    assert synced == [0.0, 2.0, 4.0, 6.0, 6.0]


def test_a_failing_fsync_is_no_lost_row_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with LedgerWriter(tmp_path, FakeClock(), rotate_bytes=300) as writer:
        for number in range(9):
            writer.append(note(number))
            assert writer.flush()
    assert len(codes(tmp_path)) == 9
    assert not list(tmp_path.glob("*.gz"))  # a copy that is not safe takes nothing's place
    assert not list(tmp_path.glob("*.part"))
    assert sum("synchronised" in record.message for record in caplog.records) == 1
    assert sum("compressed" in record.message for record in caplog.records) == 1


# -- rotation and compression ---------------------------------------------------------------------


def test_a_full_file_is_followed_by_another_and_compressed_in_the_writers_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()

    def spy(file: LedgerFile, *, is_own: bool) -> Iterator[None]:
        threads.add(threading.current_thread().name)
        return compress(file, is_own=is_own)

    monkeypatch.setattr(output, "compress", spy)
    with LedgerWriter(tmp_path, FakeClock(), rotate_bytes=1000) as writer:
        for number in range(100):
            writer.append(note(number, "ü" * 100))
            if number % 10 == 0:
                assert writer.flush()
    names = sorted(os.listdir(tmp_path))
    assert len(names) > 5
    assert [name for name in names if not name.endswith(".gz")] == [f"events-{len(names)}.jsonl"]
    assert codes(tmp_path) == [f"EADT-{number:03}" for number in range(100)]
    contents = read_ledger(tmp_path)
    assert len(contents.of_type(LedgerRow)) == len(names)  # each file begins with its own
    assert [row.seq for row in contents.rows] == list(range(1, len(contents.rows) + 1))
    assert not contents.damage
    assert threads == {"eadt-ledger"}
    assert gzip.decompress((tmp_path / "events-1.jsonl.gz").read_bytes()).endswith(b"}\n")


def test_a_file_of_a_day_is_followed_by_another(tmp_path: Path) -> None:
    clock = FakeClock()
    out = new_output(tmp_path, clock, rotate_s=86400.0)
    for number, pause_s in enumerate((86399.0, 1.0, 0.0)):
        out.take([encode(note(number))])
        out.drain()
        clock.advance(pause_s)
    assert sorted(os.listdir(tmp_path)) == ["events-1.jsonl", "events-2.jsonl"]
    while out.compress_piece():
        pass
    out.close()
    assert sorted(os.listdir(tmp_path)) == ["events-1.jsonl.gz", "events-2.jsonl"]
    assert codes(tmp_path) == ["EADT-000", "EADT-001", "EADT-002"]


def test_what_a_death_leaves_of_compressing_is_ignored_and_then_finished(tmp_path: Path) -> None:
    write_ledger(tmp_path, 1)
    half = compress(LedgerFile(1, tmp_path), is_own=True)
    next(half)
    (tmp_path / "left").write_bytes((tmp_path / "events-1.jsonl.gz.part").read_bytes() + b"\x1f")
    half.close()
    assert sorted(os.listdir(tmp_path)) == ["events-1.jsonl", "left"]
    (tmp_path / "left").rename(tmp_path / "events-1.jsonl.gz.part")
    assert codes(tmp_path) == ["EADT-001"]
    write_ledger(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["events-1.jsonl.gz", "events-2.jsonl"]
    assert codes(tmp_path) == ["EADT-001", "EADT-002"]
    assert not read_ledger(tmp_path).damage


def test_a_file_that_is_there_plain_and_compressed_is_read_once(tmp_path: Path) -> None:
    write_ledger(tmp_path, 1)
    plain = tmp_path / "events-1.jsonl"
    (tmp_path / "events-1.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert codes(tmp_path) == ["EADT-001"]
    assert read_ledger(tmp_path).damage.num_files == 1
    write_ledger(tmp_path, 2)
    assert not plain.exists()
    assert codes(tmp_path) == ["EADT-001", "EADT-002"]


def test_a_file_that_is_compressed_while_the_ledger_is_read_is_read_from_its_copy(tmp_path: Path) -> None:
    output_ = new_output(tmp_path, rotate_bytes=100)
    for number in range(3):
        output_.take([encode(note(number))])
        output_.drain()
    rows = iter_ledger(tmp_path)
    next(rows)
    for number in (1, 2):
        list(compress(LedgerFile(number, tmp_path), is_own=True))
    assert not (tmp_path / "events-2.jsonl").exists()
    assert [row.code for row in rows if isinstance(row, NoteRow)] == ["EADT-000", "EADT-001", "EADT-002"]
    output_.close()


# -- reading what is damaged ----------------------------------------------------------------------


@given(cut=st.integers(min_value=0))
def test_a_file_cut_anywhere_loses_only_its_last_row(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    lines = [encode(NoteRow(code=str(number), text="ü", seq=number)) + b"\n" for number in range(5)]
    data = b"".join(lines)
    kept = data[: cut % (len(data) + 1)]
    (folder / "events-1.jsonl").write_bytes(kept)
    contents = read_ledger(folder)
    num_whole = kept.count(b"\n")
    # A line that lacks nothing but its end is whole too.
    assert len(contents.rows) in (num_whole, num_whole + 1)
    assert [row.seq for row in contents.rows] == list(range(len(contents.rows)))
    is_torn = bool(kept) and not kept.endswith(b"\n") and len(contents.rows) == num_whole
    assert contents.damage.torn == ["events-1.jsonl"] * is_torn
    assert contents.damage.num_corrupt == 0


def test_every_sort_of_damage_is_counted_and_named(tmp_path: Path) -> None:
    good = encode(note(1)).decode()
    (tmp_path / "events-1.jsonl").write_text(
        '{"type":"ledger","schema_version":1}\n'
        + f"{good}\n"
        + "{garbage}\n"
        + "\n"
        + '{"type":"note","code":5,"text":"x"}\n'
        + '{"type":"energy","node":"n"}\n'
        + f"{good}{good}\n"
        + '{"type":"weather","sun":true}\n'
        + '{"type":"weather","sun":false}\n'
        + f"{good}\n"
        + '{"type":"no'
    )
    (tmp_path / "events-3.jsonl").write_bytes(
        b'\xff\n[1]\n{"type":3}\n{"type":"note","code":"\xff","text":""}\n' + b"[" * 100_000 + b"\n\x00\x00"
    )
    (tmp_path / "events-4.jsonl").write_text(
        '{"type":"ledger","schema_version":7,"eadt_version":{}}\n' + good
    )
    (tmp_path / "events-5.jsonl").mkdir()
    (tmp_path / "events-6.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "events-0.jsonl").write_text(good)
    (tmp_path / "notes.txt").write_text("not a ledger file")
    contents = read_ledger(tmp_path)
    assert len(contents.rows) == contents.damage.num_rows == 3
    damage = contents.damage
    assert damage.num_files == 5
    assert damage.torn == ["events-1.jsonl", "events-3.jsonl"]
    assert damage.corrupt == ["events-1.jsonl:3", "events-1.jsonl:7"] + [
        f"events-3.jsonl:{line}" for line in range(1, 6)
    ]
    assert damage.num_corrupt == 7
    assert damage.senseless == [
        "events-1.jsonl:5: note: Expected `str`, got `int` - at `$.code`",
        "events-1.jsonl:6: energy: Object missing required field `t0`",
    ]
    assert damage.unknown == {"weather": 2}
    assert damage.newer == ["events-4.jsonl: version 7"]
    assert damage.unreadable == [
        "events-5.jsonl: Is a directory (read up to line 0)",
        "events-6.jsonl: is gone (read up to line 0)",
    ]
    assert damage.missing == ["events-2.jsonl"]
    text = " ".join(damage.sentences())
    for named in (
        "events-4.jsonl: version 7",
        "Is a directory",
        "events-2.jsonl",
        "weather (2)",
        "and 2 more",
    ):
        assert named in text
    assert len(damage.sentences()) == 7
    assert damage


def test_two_rows_in_a_line_are_no_row(tmp_path: Path) -> None:
    (tmp_path / "events-1.jsonl").write_bytes(encode(note(1)) * 2 + b"\n" + encode(note(2)) + b"\n")
    assert codes(tmp_path) == ["EADT-002"]
    assert read_ledger(tmp_path).damage.corrupt == ["events-1.jsonl:1"]


def test_names_of_damage_are_bounded_and_its_count_is_not(tmp_path: Path) -> None:
    lines = ["{", '{"type":"note"}'] * 1000 + [f'{{"type":"kind{k}"}}' for k in range(1000)]
    (tmp_path / "events-1.jsonl").write_text("\n".join(lines) + "\n")
    damage = read_ledger(tmp_path).damage
    assert (damage.num_corrupt, damage.num_senseless, sum(damage.unknown.values())) == (1000, 1000, 1000)
    assert len(damage.corrupt) == len(damage.senseless) == 50
    assert len(damage.unknown) == 51
    assert len(" ".join(damage.sentences())) < 2000


def compressed_ledger(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    with LedgerWriter(folder, FakeClock()) as writer:
        for number in range(3000):
            writer.append(NoteRow(code=str(number), text=rng.bytes(60).hex()))
    list(compress(LedgerFile(1, folder), is_own=True))
    return folder / "events-1.jsonl.gz"


def test_a_compressed_file_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = compressed_ledger(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    contents = read_ledger(tmp_path)
    assert 1400 < len(contents.rows) < 1600
    assert [row.seq for row in contents.rows] == list(range(1, len(contents.rows) + 1))
    [unreadable] = contents.damage.unreadable
    assert unreadable.startswith("events-1.jsonl.gz: ends before its end")
    assert f"(read up to line {len(contents.rows)})" in unreadable


def test_a_compressed_file_that_is_damaged_is_read_up_to_the_damage(tmp_path: Path) -> None:
    deflate = zlib.compressobj(wbits=31)
    blocks = [
        deflate.compress(encode(NoteRow(code="EADT-001", text="x", seq=k)) + b"\n")
        + deflate.flush(zlib.Z_SYNC_FLUSH)
        for k in range(50)
    ]
    damaged = b"".join(blocks[:30]) + b"\xff" * 100 + b"".join(blocks[30:]) + deflate.flush()
    (tmp_path / "events-1.jsonl.gz").write_bytes(damaged)
    contents = read_ledger(tmp_path)
    assert [row.seq for row in contents.rows] == list(range(30))
    [unreadable] = contents.damage.unreadable
    assert unreadable.startswith("events-1.jsonl.gz: Error -3")
    assert unreadable.endswith("(read up to line 30)")


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 1_000_000)
    row = encode(note(1)) + b"\n"
    (tmp_path / "events-1.jsonl").write_bytes(row + bytes(30_000_000) + b"\n" + row + bytes(30_000_000))
    tracemalloc.start()
    contents = read_ledger(tmp_path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(contents.rows) == 2
    assert contents.damage.corrupt == ["events-1.jsonl:2"]
    assert contents.damage.torn == ["events-1.jsonl"]
    assert peak_bytes < 6_000_000


@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_long_ledger_is_read_in_constant_memory(tmp_path: Path, is_compressed: bool) -> None:
    lines = b"".join(
        encode(EnergyRow(node="n", t0=k, t1=k + 1, use="useful", joules=[1.0, None])) + b"\n"
        for k in range(1000)
    )
    (tmp_path / "events-1.jsonl").write_bytes(lines * 200)
    if is_compressed:
        list(compress(LedgerFile(1, tmp_path), is_own=True))
    tracemalloc.start()
    num_rows = sum(1 for _ in iter_ledger(tmp_path))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_rows == 200_000
    assert peak_bytes < 8_000_000


# -- the digest -----------------------------------------------------------------------------------


def assert_digest_tells_all(folder: Path) -> None:
    """The digest is used, and says what the whole ledger says."""
    short, whole = open_ledger(folder, Tally), open_ledger(folder, Tally, from_ledger=True)
    assert short.why_all == ""
    assert whole.why_all
    assert short.books == whole.books
    assert short.damage == whole.damage
    assert short.covered == whole.covered
    assert whole.books.num_rows == len(read_ledger(folder).rows) > 0


def why_all(folder: Path) -> str:
    opened = open_ledger(folder, Tally)
    assert opened.books == open_ledger(folder, Tally, from_ledger=True).books
    return opened.why_all


def test_the_digest_and_what_came_after_it_tell_what_the_ledger_tells(tmp_path: Path) -> None:
    clock = FakeClock()
    opened: OpenedLedger[Tally] = open_ledger(tmp_path, Tally)
    assert opened.why_all == "there is no digest.json"
    out = new_output(tmp_path, clock, digest=RunningDigest(opened), rotate_bytes=400)
    opened.books.add(note())  # the caller goes on with its own books
    for number in range(30):
        out.take([encode(note(number))])
        out.drain()
        out.save_digest_if_due()
        out.compress_piece()
        clock.advance(25.0)
        assert_digest_tells_all(tmp_path)
    assert len(list(tmp_path.glob("*.gz"))) > 1
    out.close()
    assert_digest_tells_all(tmp_path)


def test_the_digest_saves_reading_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_with_digest(tmp_path, *range(100))
    monkeypatch.setattr(Tally, "add", lambda self, row: pytest.fail("a row was read"))
    assert open_ledger(tmp_path, Tally).books.num_rows == 101


def test_opening_leaves_the_garbage_collector_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_with_digest(tmp_path, 1)
    for is_on in (True, False):
        (gc.enable if is_on else gc.disable)()
        try:
            open_ledger(tmp_path, Tally)
            open_ledger(tmp_path, Tally, from_ledger=True)
            assert gc.isenabled() is is_on
        finally:
            gc.enable()
    monkeypatch.setattr(Tally, "from_state", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_ledger(tmp_path, Tally)
    assert gc.isenabled()


def test_a_digest_goes_on_through_sessions_and_keeps_their_damage(tmp_path: Path) -> None:
    write_with_digest(tmp_path, 1, 2)
    with (tmp_path / "events-1.jsonl").open("ab") as file:
        file.write(b'{garbage}\n{"type":"sun"}\n{"type":"note"}\n' + encode(note(3)) + b'\n{"type":"no')
    assert_digest_tells_all(tmp_path)
    write_with_digest(tmp_path, 4)
    write_with_digest(tmp_path, 5)
    damage = open_ledger(tmp_path, Tally).damage
    assert damage.corrupt == ["events-1.jsonl:4"]
    assert damage.unknown == {"sun": 1}
    assert damage.senseless == ["events-1.jsonl:6: note: Object missing required field `code`"]
    assert damage.torn == ["events-1.jsonl"]
    assert damage.num_files == 3
    assert_digest_tells_all(tmp_path)


def test_a_digest_knows_rows_as_readers_know_them(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path, FakeClock(), opened=open_ledger(tmp_path, Tally)) as writer:
        writer.append(ObservationRow(at_s=1.0, window_s=1.0, setpoint=None, power_w=math.nan))
        writer.append(NoteRow(code=5, text="not a text"))  # type: ignore[arg-type]
    assert open_ledger(tmp_path, Tally).damage.num_senseless == 1
    assert_digest_tells_all(tmp_path)


def test_the_digest_outlasts_the_compression_of_the_file_it_ends_in(tmp_path: Path) -> None:
    write_with_digest(tmp_path, 1, 2)
    write_ledger(tmp_path, 3)  # compresses the first file, and leaves the digest as it was
    assert (tmp_path / "events-1.jsonl.gz").exists()
    assert_digest_tells_all(tmp_path)


def test_the_digest_may_end_deep_in_a_compressed_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with LedgerWriter(tmp_path, FakeClock(), opened=open_ledger(tmp_path, Tally)) as writer:
        for number in range(100):
            writer.append(note(number, rng.bytes(5000).hex()))
    with (tmp_path / "events-1.jsonl").open("ab") as file:
        file.write(encode(note(100)) + b"\n{")
    list(compress(LedgerFile(1, tmp_path), is_own=True))
    assert_digest_tells_all(tmp_path)


def test_the_books_of_a_run_are_the_same_from_the_digest_and_from_the_ledger(tmp_path: Path) -> None:
    """Three sessions of a writer each, with real books."""
    components = [
        MeteredComponent(component=name, source="rapl", quality="measured") for name in ("cpu", "dram")
    ]
    for session in range(3):
        opened = open_books(tmp_path)
        writer = LedgerWriter(tmp_path, FakeClock(), opened=opened, rotate_bytes=2000)
        writer.start()
        resumed = 40 * session
        writer.append(SessionRow(run_id="r", name="r", resumed_step=resumed, train_batch_size=4))
        writer.append(NodeRow(node="n", boot_id="b", monotonic_s=100.0 * session, components=components))
        for k in range(50):
            assert k % 10 or writer.flush()
            begin = 100.0 * session + k
            writer.append(
                EnergyRow(
                    node="n", t0=begin, t1=begin + 1, use="useful", joules=[10.125, None if k == 9 else 2.5],
                    step=resumed + k, generation=1, shared={"input": 0.1},
                )
            )  # fmt: skip
            writer.append(
                StepsRow(
                    node="n", generation=1, setting=1, first_step=resumed + k + 1, t0=[begin], seconds=[1.0],
                    loss=[1.0], learning_rate=[0.1], samples=4,
                )
            )  # fmt: skip
        assert writer.close()
    short, whole = open_books(tmp_path), open_books(tmp_path, from_ledger=True)
    assert (short.why_all, short.damage) == ("", whole.damage)
    assert len(list(tmp_path.glob("*.gz"))) > 5
    energy = short.books.energy()
    assert energy is not None
    assert energy.value == pytest.approx(150 * 12.625 - 3 * 2.5)
    assert (short.books.optimizer_steps, short.books.lost_steps) == (130, 20)
    assert short.books.energy_by("use")["lost"].value == pytest.approx(20 * 12.625)
    for name in ("energy_cells", "sessions", "nodes", "series", "settings", "not_measured", "samples"):
        figures = [getattr(opened.books, name) for opened in (short, whole)]
        first, second = [figure() if callable(figure) else figure for figure in figures]
        assert first == second, name


def edit_digest(folder: Path, **changes: Any) -> None:
    path = folder / "digest.json"
    path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), **changes}))


def other_ledger(folder: Path) -> None:
    with LedgerWriter(folder / "other", FakeClock(unix_s=1.0)) as writer:
        for number in range(9):
            writer.append(note(number))
    (folder / "other" / "events-1.jsonl").replace(folder / "events-2.jsonl")


def as_tally(**values: int) -> dict[str, Any]:
    state = Tally(**values).to_state()
    return {"state": state, "state_crc": zlib.crc32(state)}


DIGEST_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (lambda folder: (folder / "digest.json").unlink(), "there is no digest.json"),
    "torn": (lambda folder: os.truncate(folder / "digest.json", 200), "digest.json is damaged"),
    "empty": (lambda folder: (folder / "digest.json").write_bytes(b""), "digest.json is damaged"),
    "no digest": (lambda folder: (folder / "digest.json").write_text("[]"), "digest.json is damaged"),
    "a folder": (
        lambda folder: ((folder / "digest.json").unlink(), (folder / "digest.json").mkdir()),
        "digest.json cannot be read: Is a directory",
    ),
    "flipped": (lambda folder: edit_digest(folder, state_crc=1), "digest.json is damaged"),
    "newer": (lambda folder: edit_digest(folder, digest_version=2), "digest.json is of another version"),
    "other rows": (lambda folder: edit_digest(folder, schema_version=2), "digest.json is of another version"),
    "newer books": (
        lambda folder: edit_digest(folder, **as_tally(version=2)),
        "the books in the digest cannot be used: another version",
    ),
    "earlier file changed": (
        lambda folder: (folder / "events-1.jsonl.gz").write_bytes(gzip.compress(b"{}\n")),
        "the ledger's files are not those",
    ),
    "earlier file gone": (
        lambda folder: (folder / "events-1.jsonl.gz").unlink(),
        "the ledger's files are not",
    ),
    "its file gone": (
        lambda folder: (folder / "events-2.jsonl").unlink(),
        "the file that the digest ends in",
    ),
    "its file cut": (lambda folder: os.truncate(folder / "events-2.jsonl", 200), "events-2.jsonl is not the"),
    "of another run": (other_ledger, "events-2.jsonl is not the file"),
}


@pytest.mark.parametrize("fault", DIGEST_FAULTS)
def test_without_a_digest_that_fits_the_whole_ledger_is_read(tmp_path: Path, fault: str) -> None:
    write_with_digest(tmp_path, 1, 2)
    write_with_digest(tmp_path, 3, 4)
    assert_digest_tells_all(tmp_path)
    break_it, why = DIGEST_FAULTS[fault]
    break_it(tmp_path)
    assert why_all(tmp_path).startswith(why)


def test_a_file_that_could_not_be_opened_is_read_once_it_can_be(tmp_path: Path) -> None:
    write_ledger(tmp_path, 1)
    (tmp_path / "events-1.jsonl").rename(tmp_path / "aside")
    (tmp_path / "events-1.jsonl").mkdir()
    write_with_digest(tmp_path, 2)
    opened = open_ledger(tmp_path, Tally)
    assert opened.why_all == ""
    assert opened.damage.unreadable == ["events-1.jsonl: Is a directory (read up to line 0)"]
    (tmp_path / "events-1.jsonl").rmdir()
    (tmp_path / "aside").rename(tmp_path / "events-1.jsonl")
    assert why_all(tmp_path).startswith("the ledger's files are not those")


def test_what_another_writer_wrote_meanwhile_is_not_forgotten(tmp_path: Path) -> None:
    other = LedgerWriter(tmp_path, FakeClock())
    other.append(note(1))
    other.start()
    other.flush()
    write_with_digest(tmp_path, 2)
    assert_digest_tells_all(tmp_path)
    other.append(note(3))
    other.close()
    assert why_all(tmp_path).startswith("the ledger's files are not those")
    assert open_ledger(tmp_path, Tally).books.num_rows == 5


def test_the_digest_is_written_after_its_interval_at_a_files_end_and_at_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[float] = []
    clock = FakeClock(monotonic_s=0.0)
    save = digest.save_digest

    def spy(*args: Any) -> None:
        saved.append(clock.monotonic_s())
        save(*args)

    monkeypatch.setattr(digest, "save_digest", spy)
    running = RunningDigest(open_ledger(tmp_path, Tally))
    out = new_output(tmp_path, clock, digest=running, digest_interval_s=60.0, rotate_s=150.0)
    for number in range(21):
        out.take([encode(note(number))])
        out.drain()
        out.save_digest_if_due()
        clock.advance(10.0)
    assert saved == [0.0, 60.0, 120.0, 150.0]
    out.close()
    assert saved == [0.0, 60.0, 120.0, 150.0, 210.0]
    out.close()
    assert len(saved) == 5  # nothing new


def test_a_digest_that_cannot_be_written_costs_no_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "digest.json").mkdir(parents=True)
    write_with_digest(tmp_path, 1, 2)
    assert codes(tmp_path) == ["EADT-001", "EADT-002"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert sorted(os.listdir(tmp_path)) == ["digest.json", "events-1.jsonl"]


def test_books_that_fail_cost_the_digest_and_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_ledger(tmp_path, Tally)

    def fail(self: Tally, row: AnyRow) -> None:
        raise KeyError("a fault")

    with LedgerWriter(tmp_path, FakeClock(), opened=opened) as writer, monkeypatch.context() as patched:
        patched.setattr(Tally, "add", fail)
        writer.append(note(1))
        writer.append(note(2))
        assert writer.flush()
    assert codes(tmp_path) == ["EADT-001", "EADT-002"]
    assert not (tmp_path / "digest.json").exists()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
