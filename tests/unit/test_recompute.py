"""``examples/recompute_energy.py`` agrees with ``Books`` on any ledger and reads a run's folder."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings

from eadt.record.books import Books
from eadt.record.rows import AnyRow, LedgerRow, encode
from tests.unit.books_factory import NODE, RowList, a_run, any_ledger, books_of

SCRIPT = Path(__file__).parents[2] / "examples" / "recompute_energy.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recompute_energy", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, rows: list[AnyRow], *, compressed: int = 0) -> Path:
    """A file for each session; the first ``compressed`` of them in gzip."""
    files: list[list[bytes]] = []
    for row in rows:
        if isinstance(row, LedgerRow) or not files:
            files.append([])
        files[-1].append(encode(row) + b"\n")
    ledger = folder / "ledger"
    ledger.mkdir(parents=True)
    for number, lines in enumerate(files, start=1):
        name = f"events-{number}.jsonl"
        if number <= compressed:
            (ledger / f"{name}.gz").write_bytes(gzip.compress(b"".join(lines)))
        else:
            (ledger / name).write_bytes(b"".join(lines))
    return folder


def run_script(folder: Path) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-I", str(SCRIPT), str(folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def totals(books: Books) -> dict[str, Any]:
    """What the script prints, of books."""
    total = books.energy()
    answer: dict[str, Any] = {"total_j": None if total is None else total.value}
    for attribute in ("use", "component", "quality", "node"):
        answer[f"by_{attribute}_j"] = {name: part.value for name, part in books.energy_by(attribute).items()}
    return answer | {"samples": books.samples, "optimizer_steps": books.optimizer_steps}


def assert_agrees(answer: dict[str, Any], books: Books) -> None:
    for name, wanted in totals(books).items():
        if isinstance(wanted, dict):
            told = {part: joules for part, joules in answer[name].items() if joules}
            wanted = {part: joules for part, joules in wanted.items() if joules}
            assert told == pytest.approx(wanted, abs=1e-3), name
        elif isinstance(wanted, float):
            assert (answer[name] or 0.0) == pytest.approx(wanted, abs=1e-3), name
        elif name != "total_j":
            assert answer[name] == wanted, name
    # The script counts rounding between intervals too, at most 1 ms each.
    missing_s = books.not_measured.component_seconds
    assert answer["unmeasured_component_seconds"] == pytest.approx(
        missing_s, abs=0.003 * books.num_rows + 0.001
    )


@settings(max_examples=200)
@given(rows=any_ledger(sound=True))
def test_the_script_agrees_with_books_on_any_ledger(rows: list[AnyRow]) -> None:
    session, numbered = 0, []
    for row in rows:
        plain = defaultdict(dict, json.loads(encode(row)))
        begins = plain["type"] == "session"
        session += begins
        owner = (session - 1, 2**31) if begins else (session, plain["generation"] or 0)
        numbered.append((session, owner, plain))
    assert_agrees(load().recompute(numbered), books_of(rows))


@pytest.mark.parametrize("compressed", [0, 1, 2])
def test_the_script_reads_a_run_s_folder(tmp_path: Path, compressed: int) -> None:
    rows = RowList()
    rows.rows = a_run(ended=False)
    rows.rows.insert(0, rows.rows[0])
    rows.rows[0] = LedgerRow(schema_version=1)
    rows.rows.pop(1)
    rows.session(60)
    rows.node("cpu gpu0", at_s=1.0)
    rows.energy(1.0, 9.0, "startup", 240.0, None, generation=0, setting=0)
    rows.energy(
        9.0, 19.0, "useful", 300.0, 2000.0, step=60, shared={"input": 0.1}, shared_cpu={"change": 0.5}
    )
    rows.energy(9.0, 19.0, "useful", 300.0, 2000.0, step=60)
    rows.steps(61, 9.0, *[2.0] * 10)
    rows.end(at_s=20.0)
    books = books_of(rows)
    answer = run_script(write(tmp_path / "demo", rows.rows, compressed=compressed))
    assert_agrees(answer, books)
    total = books.energy()
    assert total is not None
    assert answer["total_j"] == pytest.approx(total.value, abs=1e-6)
    assert answer["by_use_j"]["lost"] == pytest.approx(3600.0 + 2 * (300.0 + 1500.0))
    assert answer["by_node_j"][NODE] > 0
    assert (answer["samples"], answer["optimizer_steps"]) == (560, 70)
    assert answer["unmeasured_component_seconds"] == pytest.approx(10.0 + 8.0)


def test_torn_lines_double_files_and_the_order_of_numbers(tmp_path: Path) -> None:
    rows = RowList()
    for number in range(12):
        rows.session(number)
        rows.node()
        rows.energy(0.0, 1.0, "useful", 1.0, step=number)
        rows.steps(number + 1, 0.0, 1.0)
    folder = write(tmp_path / "demo", rows.rows)
    first, last = folder / "ledger" / "events-1.jsonl", folder / "ledger" / "events-12.jsonl"
    (folder / "ledger" / "events-1.jsonl.gz").write_bytes(gzip.compress(first.read_bytes()))
    (folder / "ledger" / "events-2.jsonl.gz.part").write_bytes(b"half")
    with last.open("ab") as file:
        file.write(b'{"type":"energy","node":"a","t0":1')
    answer = run_script(folder)
    assert (answer["total_j"], answer["optimizer_steps"]) == (12.0, 12)


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "demo", [LedgerRow(schema_version=2)])
    with pytest.raises(subprocess.CalledProcessError):
        run_script(folder)


def test_it_is_short_and_needs_nothing_but_python() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    names = {
        alias.name.split(".")[0] if isinstance(node, ast.Import) else str(node.module).split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert names <= set(sys.stdlib_module_names)
