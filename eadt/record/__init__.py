"""The record of a run: rows, ledger files, books."""
