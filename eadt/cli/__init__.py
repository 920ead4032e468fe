"""The command line: ``eadt run | validate | schema | status | report | doctor``.

Owns what the user types, reads and gets back as an exit status. Heavy imports (torch, Ray) happen within
the commands that need them, so that ``eadt --help`` and ``eadt validate`` are fast.
"""

from eadt.cli.app import app, main

__all__ = ["app", "main"]
