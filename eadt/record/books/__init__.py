"""``Books``: every total of a run, kept row by row and rebuilt from the ledger by the same code."""

from eadt.record.books.books import Books

__all__ = ["Books"]
