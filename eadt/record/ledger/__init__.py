"""The ledger's files: the append-only record of a run, from which every total is recomputed.

Owns ``events-<k>.jsonl`` in a run's ledger folder (one row a line; finished ones compressed to
``events-<k>.jsonl.gz``) and the digest beside them. What the rows are is in :mod:`eadt.record.rows`, what
they add up to in :mod:`eadt.record.books`. A row that was written is never changed.
"""

from __future__ import annotations

from eadt.record.ledger.damage import Damage
from eadt.record.ledger.opening import OpenedLedger, open_books
from eadt.record.ledger.reader import LedgerContents, iter_ledger, read_ledger
from eadt.record.ledger.writer import LedgerWriter

__all__ = [
    "Damage",
    "LedgerContents",
    "LedgerWriter",
    "OpenedLedger",
    "iter_ledger",
    "open_books",
    "read_ledger",
]
