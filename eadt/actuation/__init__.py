"""Writes: one knob a module."""
