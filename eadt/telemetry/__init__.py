"""Reads: sensors, meter, ledger, report."""
