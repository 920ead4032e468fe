"""The ledger: what is written is read back, and what is damaged is counted."""

from __future__ import annotations

import json
import math
import os
import threading
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eadt.record import ledger
from eadt.record.ledger import LedgerWriter, read_ledger
from eadt.testing.clock import FakeClock
from eadt.units import Quality


def test_rows_come_back_with_seq_and_wall_time(tmp_path: Path) -> None:
    clock = FakeClock(unix_s=1_700_000_000.0)
    with LedgerWriter(tmp_path / "ledger", clock) as writer:
        assert writer.append({"type": "note", "code": "EADT-001", "text": "eins"}) == 1
        clock.advance(1.5)
        assert writer.append({"type": "fault", "kind": "engine", "node": None, "detail": "ü"}) == 2
    contents = read_ledger(tmp_path / "ledger")
    assert [row["seq"] for row in contents.rows] == [1, 2]
    assert [row["unix_s"] for row in contents.rows] == [1_700_000_000.0, 1_700_000_001.5]
    assert contents.rows[1]["detail"] == "ü"
    assert (contents.num_torn, contents.corrupt, contents.num_files) == (0, (), 1)


def test_a_row_is_in_the_file_before_append_returns(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, FakeClock())
    writer.append({"type": "note"})
    assert len(read_ledger(tmp_path).rows) == 1
    writer.close()


def test_nothing_is_made_before_the_first_row(tmp_path: Path) -> None:
    LedgerWriter(tmp_path / "ledger", FakeClock()).close()
    assert not (tmp_path / "ledger").exists()
    assert read_ledger(tmp_path / "ledger").rows == ()


def test_each_writer_has_its_own_file_and_files_are_ordered_by_number(tmp_path: Path) -> None:
    for number in range(11):  # 10 and 11 sort before 2 as text
        with LedgerWriter(tmp_path, FakeClock()) as writer:
            writer.append({"type": "note", "number": number})
            assert writer.path == tmp_path / f"events-{number + 1}.jsonl"
    assert [row["number"] for row in read_ledger(tmp_path).rows] == list(range(11))


def test_two_writers_at_once_do_not_share_a_file(tmp_path: Path) -> None:
    first, second = LedgerWriter(tmp_path, FakeClock()), LedgerWriter(tmp_path, FakeClock())
    first.append({"type": "note"})
    second.append({"type": "note"})
    assert first.path != second.path
    first.close()
    second.close()


def test_plain_values_only(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path, FakeClock()) as writer:
        writer.append(
            {
                "type": "x",
                "loss": math.nan,
                "worse": math.inf,
                "quality": Quality.ESTIMATED,
                "count": np.int64(3),
                "power_w": np.float32(1.5),
                "path": tmp_path,
                "nested": {"tuple": (1, -math.inf)},
            }
        )
        with pytest.raises(TypeError, match="cannot hold object"):
            writer.append({"type": "x", "bad": object()})
        with pytest.raises(ValueError, match="needs a type"):
            writer.append({"code": "x"})
    (row,) = read_ledger(tmp_path).rows
    assert row["loss"] is None
    assert row["worse"] is None
    assert row["quality"] == "estimated"
    assert row["count"] == 3
    assert row["power_w"] == 1.5
    assert row["path"] == str(tmp_path)
    assert row["nested"] == {"tuple": [1, None]}


def test_a_closed_writer_refuses(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, FakeClock())
    writer.append({"type": "note"})
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.append({"type": "note"})


def test_fsync_at_most_every_two_seconds_and_at_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[float] = []
    clock = FakeClock(monotonic_s=0.0)
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(clock.monotonic_s()))
    writer = LedgerWriter(tmp_path, clock)
    for _ in range(11):
        writer.append({"type": "note"})
        clock.advance(0.5)
    assert synced == [0.0, 2.0, 4.0]
    writer.close()
    assert synced == [0.0, 2.0, 4.0, 5.5]


def test_threads_do_not_mix_lines(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, FakeClock())

    def append(thread: int) -> None:
        for number in range(50):
            writer.append({"type": "note", "thread": thread, "number": number, "filler": "x" * 200})

    threads = [threading.Thread(target=append, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    contents = read_ledger(tmp_path)
    assert [row["seq"] for row in contents.rows] == list(range(1, 201))
    assert {(row["thread"], row["number"]) for row in contents.rows} == {
        (thread, number) for thread in range(4) for number in range(50)
    }


@given(cut=st.integers(min_value=0))
def test_a_file_cut_anywhere_loses_only_its_last_row(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    with LedgerWriter(folder, FakeClock()) as writer:
        for number in range(5):
            writer.append({"type": "note", "number": number, "text": "ü"})
    path = folder / "events-1.jsonl"
    data = path.read_bytes()
    kept = data[: cut % (len(data) + 1)]
    path.write_bytes(kept)
    contents = read_ledger(folder)
    whole_lines = kept.count(b"\n")
    # A line that lacks nothing but its newline is whole too.
    assert len(contents.rows) in (whole_lines, whole_lines + 1)
    assert [row["number"] for row in contents.rows] == list(range(len(contents.rows)))
    assert contents.num_torn == int(
        bool(kept) and not kept.endswith(b"\n") and len(contents.rows) == whole_lines
    )
    assert contents.corrupt == ()


def test_torn_last_lines_of_every_file_and_corrupt_lines_are_counted(tmp_path: Path) -> None:
    good = '{"type": "note", "seq": %d, "unix_s": 1.0}\n'
    (tmp_path / "events-1.jsonl").write_text(good % 1 + "{garbage}\n" + good % 2 + '{"type": "no')
    (tmp_path / "events-2.jsonl").write_bytes(b"\xff\n[1]\n" + (good % 1).encode() + b'{"seq"')
    (tmp_path / "notes.txt").write_text("not a ledger file")
    contents = read_ledger(tmp_path)
    assert len(contents.rows) == 3
    assert contents.num_torn == 2
    assert contents.corrupt == ("events-1.jsonl:2", "events-2.jsonl:1", "events-2.jsonl:2")


def test_rows_within_a_file_are_ordered_by_seq(tmp_path: Path) -> None:
    lines = [json.dumps({"type": "note", "seq": seq, "unix_s": 0.0}) for seq in (2, 1, 3)]
    (tmp_path / "events-1.jsonl").write_text("\n".join(lines) + "\n")
    assert [row["seq"] for row in read_ledger(tmp_path).rows] == [1, 2, 3]


class FillingDisk(FileIO):
    """A real file on a pretended disk that takes only so many writes whole."""

    refuse = False
    num_refused = 0

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if FillingDisk.refuse:
            FillingDisk.num_refused += 1
            if FillingDisk.num_refused > 1:
                raise OSError(28, "No space left on device")
            return super().write(data[:7])
        return super().write(data)


def test_a_full_disk_never_raises_and_is_said_once_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger, "FileIO", FillingDisk)
    writer = LedgerWriter(tmp_path, FakeClock())
    writer.append({"type": "first"})
    FillingDisk.refuse = True
    writer.append({"type": "half written"})
    writer.append({"type": "refused"})
    assert writer.num_unwritten == 2
    assert FillingDisk.num_refused == 2  # the fault fired
    FillingDisk.refuse = False
    writer.append({"type": "last"})
    writer.close()
    contents = read_ledger(tmp_path)
    assert [row["type"] for row in contents.rows] == ["first", "note", "last"]
    assert "2 ledger rows" in contents.rows[1]["text"]
    assert contents.corrupt == ("events-1.jsonl:2",)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_failing_fsync_is_no_lost_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with LedgerWriter(tmp_path, FakeClock()) as writer:
        writer.append({"type": "note"})
        assert writer.num_unwritten == 0
    assert len(read_ledger(tmp_path).rows) == 1
