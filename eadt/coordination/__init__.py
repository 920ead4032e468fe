"""Carries out what was decided: hosts, generations, hand-overs, checkpoints, recovery."""
